"""The native text encoder that a route begins with: a fresh one, a trained one, or an earlier stage's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError, first_line
from ...formats.weights import resolve_folder
from ...models.backbone import Backbone, load_backbone
from ...text.chunks import ChunkLayout
from ...text.encoders import load_tokenizer
from ...text.native import NativeTextEncoder, NativeTextSettings
from ..states import find_state, read_state

#: A tokenizer's folder holds one of these.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def fresh_encoder(
    vocabulary: str, width: int, model: Mapping[str, Any] | None = None, chunk_length: int = 76, seed: int = 0
) -> NativeTextEncoder:
    """An untrained CLIP text model with a vocabulary of its own, causal and without a mask, as Japanese
    Stable Diffusion's.

    Args:
        vocabulary: folder of its tokenizer.
        width: of its features, unless ``model`` says another.
        model: further arguments of ``CLIPTextConfig``.
        chunk_length: tokens of text that it reads at once, markers not counted.
        seed: of the weights.

    Raises:
        UserError: no such vocabulary.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = resolve_folder(vocabulary)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"recipe.native_text_encoder.vocabulary: {folder} holds no vocabulary"
            f" ({', '.join(VOCABULARY_FILES)}); give a tokenizer's folder"
        )
    tokenizer = load_tokenizer(folder)
    settings = NativeTextSettings(chunk_length=chunk_length, lower_case=False)
    layout = ChunkLayout.of(tokenizer, chunk_length, settings.max_chunks)
    begin, end = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    own: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        max_position_embeddings=layout.length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=end if begin is None else begin,
        eos_token_id=end,
    )
    torch.manual_seed(seed)
    try:
        built = CLIPTextModel(CLIPTextConfig(**{**own, **(model or {})}))
    except Exception as error:  # transformers checks each argument in its own way
        raise UserError(
            f"recipe.native_text_encoder.model describes no text encoder ({first_line(error)}); correct it"
        ) from None
    return NativeTextEncoder(built, tokenizer, settings)


@dataclass(frozen=True)
class Start:
    """An earlier run that a run goes on from.

    Attributes:
        run: its folder, or its finished model's.
        weights: the averaged ones, as it was finished with, or those of its last step.
        moments: whether the optimizer goes on with its moments.
    """

    run: str
    weights: Literal["averaged", "raw"] = "averaged"
    moments: bool = False

    @property
    def model(self) -> Path:
        """The finished model.

        Raises:
            UserError: there is none, or one without a native text encoder.
        """
        run = Path(self.run)
        found = next((f for f in (run / "model", run) if (f / "model_index.json").is_file()), None)
        if found is None or not (found / "native_text_encoder").is_dir():
            raise UserError(
                f"recipe.start: {self.run} holds no finished run whose model has a native_text_encoder; train"
                " the stage before this one to its end, and name its folder"
            )
        return found

    def stock(self) -> Backbone:
        """The model's parts beside its native text encoder; a model from scratch has no English one."""
        return load_backbone(self.model, text_encoder=(self.model / "text_encoder").is_dir())

    def native(self) -> NativeTextEncoder:
        """The model's native text encoder."""
        return NativeTextEncoder.from_pretrained(self.model / "native_text_encoder")

    def read_state(self) -> dict[str, Any] | None:
        """The run's last state where raw weights or moments are wanted; the run's folder stays as it is.

        Raises:
            UserError: there is none that can be read.
        """
        if self.weights == "averaged" and not self.moments:
            return None
        path = find_state(self.run)
        if path is None:
            raise UserError(
                f"recipe.start asks for raw weights or moments, and {self.run} holds no states; keep its"
                " states folder, or take the averaged weights alone"
            )
        try:
            return read_state(path)
        except UserError as error:
            raise UserError(f"recipe.start: {error}; or take the averaged weights alone") from None


def take_weights(state: Mapping[str, Any], parts: Mapping[str, nn.Module], origin: str) -> None:
    """Give parts the weights of a run's last step, instead of its averaged ones.

    Args:
        state: see ``Start.read_state``.
        parts: all that the run may have trained, by name.
        origin: the run, for messages.

    Raises:
        UserError: it trained something else.
    """
    for name, weights in state["parts"].items():
        own = parts.get(name)
        wanted = {key: tensor.shape for key, tensor in weights.items()}
        if own is None or {key: tensor.shape for key, tensor in own.state_dict().items()} != wanted:
            raise UserError(
                f"recipe.start: {origin} trained {name!r}, which is none of this run's parts or of another"
                " size; take its averaged weights"
            )
        own.load_state_dict(weights)


def read_moments(state: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """An optimizer's moments by the name of the parameter.

    Raises:
        UserError: they are not AdamW's, or the state does not say whose they are.
    """
    kind, names = json.loads(state["run"])["optimizer"]["name"], state.get("names")
    if kind != "adamw" or names is None:
        unnamed = "" if names else " and name no weights"
        raise UserError(
            f"recipe.start.moments: those of {origin} are {kind}'s{unnamed}, and only adamw's can be taken"
            " over; set moments: false"
        )
    return {names[i]: _copied(values) for i, values in state["optimizer"]["state"].items()}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
