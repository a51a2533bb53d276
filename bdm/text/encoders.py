"""Text encoders and tokenizers of transformers' folders and cn_clip's files.

No code of a folder's is ever run: what is built is transformers' own, from settings that choose no code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line, printable
from ..formats.choice import FileChoice
from ..formats.names import largest_block
from ..formats.weights import read_json, read_tensors, read_weights_folder, refuse_not_finite
from .tokenizers import load_tokenizer as load_tokenizer

logger = logging.getLogger("bdm")

#: Settings that choose what code computes: the folder's own modules, kernels that are fetched by name.
_CHOOSES_CODE = re.compile(
    r"auto_map|attn_implementation|experts_implementation|custom_pipelines|kernel_config|use_kernels"
)
#: Weights that make features of a text encoder's last states, as AltDiffusion's and M-CLIP's are called.
_PROJECTS = re.compile(r"(?:LinearTransformation|transformation(?:_pre)?|pre_LN)\.")
#: Settings that say how many layers are built.
_COUNTS_LAYERS = re.compile(r"layers?$|^n_layer|blocks?$")


def read_encoder_config(folder: Path) -> Any:
    """The configuration of a text encoder's folder, which chooses none of the code that runs.

    What would (a module of the folder's own, an attention kernel by name) is left out.

    Raises:
        UserError: it cannot be read, is of no model that transformers itself has, or says that the weights
            are quantised.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    settings = read_json(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path} describes a model of the type {printable(kind, 60)!r}, which transformers does not"
            " have; code of the folder's own is never run: give another text encoder"
        )
    if settings.get("quantization_config"):
        raise UserError(f"{path} says that the weights are quantised; give the text encoder as it was before")
    if settings.get("auto_map"):
        logger.warning("%s names code of its own, which is not run; transformers' %s is used", path, kind)
    try:
        return CONFIG_MAPPING[kind].from_dict(_without_code(settings))
    except Exception as error:  # each model has checks and mistakes of its own
        raise UserError(f"{path} cannot be used ({first_line(error)}); get the folder again") from None


def _without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that choose what code computes; those of parts inside likewise."""
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not _CHOOSES_CODE.search(key)
    }


def load_encoder(folder: Path, files: FileChoice) -> nn.Module:
    """Build the text encoder of a folder and load its weights by hand.

    ``from_pretrained`` is not used: it zeroes the [PAD] row of Chinese CLIP, which is attended here, and
    gives a text model with random weights when asked to read one from a full CLIP checkpoint.

    Raises:
        UserError: weights or a configuration that are damaged, missing or do not belong together.
    """
    config, tensors = read_encoder_config(folder), read_weights_folder(folder, files)
    _refuse_other_projections(config, tensors, folder)
    return _build_and_load(config, tensors, folder)


def _refuse_other_projections(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that bring the states to another space, where nothing that is built would do so.

    Left out without a word, they would leave features that no network was trained for.
    """
    found = next((name for name in tensors if _PROJECTS.match(name)), None)
    if found is not None and not _is_transformed(config, tensors):
        raise UserError(
            f"{folder} holds {printable(found, 120)!r}, which makes other features of the text encoder's"
            f" states, and its config.json ({config.model_type}) describes no such model; give a text"
            " encoder without"
        )


def _is_transformed(config: Any, tensors: Collection[str]) -> bool:
    if not hasattr(config, "project_dim"):  # before anything of transformers is imported
        return False
    from .transformed import is_transformed

    return is_transformed(config, tensors)


def _build_and_load(config: Any, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """The text encoder that a configuration describes, once it is known that the weights are its own."""
    _refuse_more_layers(config.to_dict(), len(tensors), source)
    try:
        with torch.device("meta"):
            outline = build_text_model(config, tensors)
    except Exception as error:  # each model has checks and mistakes of its own
        raise UserError(f"{source} describes no text encoder ({first_line(error)}); give another") from None
    if not hasattr(outline.config, "hidden_size"):
        raise UserError(f"{source} ({config.model_type}) makes no features of texts; give a text encoder")
    state = _own_weights(outline, tensors, str(source))
    refuse_not_finite(state, source)
    model = build_text_model(config, tensors)
    # The configuration may name another dtype than the file's, and copying would round to it.
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    model.to(reduce(torch.promote_types, dtypes)).load_state_dict(state, strict=False)
    if getattr(model, "pooler", None) is not None and not any(name.startswith("pooler.") for name in state):
        setattr(model, "pooler", None)  # noqa: B010  # its weights would be others each time
    return model


def _refuse_more_layers(settings: Mapping[str, Any], tensors: int, source: Path) -> None:
    """Building so many layers would take for ever; every one has weights, and a file holds so many."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_more_layers(value, tensors, source)
        elif _COUNTS_LAYERS.search(str(key)) and isinstance(value, int) and value > tensors:
            raise UserError(
                f"{source}: its configuration says {key} {printable(value, 20)}, and its weights are"
                f" {tensors} tensors; they do not belong together"
            )


def build_text_model(config: Any, tensors: Collection[str] = ()) -> nn.Module:
    """The text encoder that a transformers configuration describes, with fresh weights.

    Args:
        config: of the model.
        tensors: names of the weights that it is built for, which tell what a configuration may leave out.
    """
    from transformers import AutoModel, AutoModelForTextEncoding, ChineseCLIPTextModel

    if _is_transformed(config, tensors):
        from .transformed import RobertaSeriesModelWithTransformation

        return RobertaSeriesModelWithTransformation(config)

    # A model of texts and pictures: its half that reads.
    half = getattr(config, "text_config", None)
    config = half if hasattr(half, "model_type") else config
    if config.model_type in ("chinese_clip", "chinese_clip_text_model"):
        return ChineseCLIPTextModel(config, add_pooling_layer=False)
    # T5's and its like's encoder alone; AutoModel would add the decoder.
    alone = type(config) in AutoModelForTextEncoding._model_mapping
    kind: Any = AutoModelForTextEncoding if alone else AutoModel
    return kind.from_config(config, trust_remote_code=False)


def _own_weights(model: nn.Module, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """A model's weights out of a file whose keys may carry a prefix (``text_model.``, ``bert.``).

    Every weight must be found, and every one that looks like the model's must be.
    """
    # Tied weights appear once in a file and several times in the model (or the other way round): one name is
    # enough.
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    first = next(iter(names.values()))[0]
    prefixes = {
        key.removesuffix(n) for group in names.values() for n in group for key in tensors if key.endswith(n)
    } | {""}

    def found(prefix: str) -> int:
        return sum(any(prefix + n in tensors for n in group) for group in names.values())

    prefix = max(sorted(prefixes), key=found) if len(prefixes) > 1 else ""
    state = {}
    for group in names.values():
        source = next((tensors[prefix + n] for n in group if prefix + n in tensors), None)
        # A pooler reads the hidden states and is not part of them; files may lack it.
        if source is None and not group[0].startswith("pooler."):
            raise UserError(
                f"{origin}: no weight for {group[0]!r} ({found(prefix)} of {len(names)} found); "
                f"give a text encoder's folder, such as Chinese CLIP's (first weight wanted: {first!r})"
            )
        if source is not None:
            state |= dict.fromkeys(group, source)
    wrong = [n for n, t in model.state_dict().items() if n in state and state[n].shape != t.shape]
    if wrong:
        raise UserError(
            f"{origin}: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)}, its config.json says "
            f"{tuple(model.state_dict()[wrong[0]].shape)}; weights and configuration do not belong together"
        )
    known = {name for group in names.values() for name in group}
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    _refuse_unread(
        [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)], known, parts, origin
    )
    return state


def _refuse_unread(given: Iterable[str], known: Collection[str], parts: Collection[str], origin: str) -> None:
    """Refuse weights beside those that are read, inside of the same parts: layers that would be left out."""
    left = [
        name
        for name in given
        if name not in known
        and name.partition(".")[0] in parts
        and ".pooler." not in f".{name}"
        and not name.endswith(("position_ids", "token_type_ids"))
    ]
    if left:
        raise UserError(
            f"{origin} holds {printable(left[0], 120)!r} ({len(left)} such weights), which the model of its"
            " config.json has not; weights and configuration do not belong together"
        )


def load_cn_clip(path: Path) -> nn.Module:
    """The text tower of an original cn_clip checkpoint (``{"state_dict": {"module.bert.": ...}}``).

    Raises:
        UserError: it holds none, or one that is damaged.
    """
    bert = cn_clip_tower(read_tensors(path))
    return _build_and_load(cn_clip_config(bert, path), bert, path)


def cn_clip_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of cn_clip's text tower under BERT's names."""
    plain = {key.removeprefix("module."): value for key, value in tensors.items()}
    return {key.removeprefix("bert."): value for key, value in plain.items() if key.startswith("bert.")}


def cn_clip_config(bert: Mapping[str, Tensor], path: Path) -> Any:
    """The configuration of cn_clip's text tower, read off the shapes of its weights.

    Raises:
        UserError: weights that tell a size are missing or have too few dimensions.
    """
    from transformers import ChineseCLIPTextConfig

    if "embeddings.word_embeddings.weight" not in bert:
        raise UserError(f"{path}: no 'bert.' weights; a Chinese CLIP checkpoint of cn_clip is wanted")
    try:
        tokens, width = bert["embeddings.word_embeddings.weight"].shape
        inner, _ = bert["encoder.layer.0.intermediate.dense.weight"].shape
        positions, _ = bert["embeddings.position_embeddings.weight"].shape
        layers = 1 + largest_block(r"encoder\.layer\.(\d+)\.", bert)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its text encoder is damaged ({first_line(error)}); get it again") from None
    return ChineseCLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        num_hidden_layers=layers,
        # All RoBERTa-wwm models of cn_clip (RBT3, base, large) have heads of width 64.
        num_attention_heads=max(1, width // 64),
        intermediate_size=inner,
        max_position_embeddings=positions,
    )
