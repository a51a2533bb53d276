"""Adapters (the LoRA family): which weights a file changes, whatever its key names.

An adapter's file holds, for some modules of the UNet and of CLIP's text encoder, the factors of a change of
their weight (see ``bdm.formats.change``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .bundled import BUNDLED, without_bundled
from .header import WeightFile
from .names import UNetBuild, flat
from .peft_settings import PeftSettings

if TYPE_CHECKING:
    from torch import Tensor

    from .change import Change

#: Endings of keys and what they are called here. kohya/LyCORIS, peft and diffusers name the same factors
#: differently.
_FACTORS = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora.up.weight": "up",
    "lora.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "row_magnitude",
    "lora_magnitude_vector.weight": "row_magnitude",
    "lora_magnitude_vector.default.weight": "row_magnitude",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "hada_t1": "w1_t",
    "hada_t2": "w2_t",
    "lokr_w1": "k1",
    "lokr_w1_a": "k1_a",
    "lokr_w1_b": "k1_b",
    "lokr_w2": "k2",
    "lokr_w2_a": "k2_a",
    "lokr_w2_b": "k2_b",
    "lokr_t2": "k2_t",
    "weight": "gain",
    "on_input": "on_input",
    "ia3_l": "factor",
    "diff": "diff",
    "diff_b": "bias",
    "w_norm": "diff",
    "b_norm": "bias",
    "scalar": "scalar",
}
#: Factors of one value each, which may be plain numbers.
_NUMBERS = ("alpha", "scalar", "on_input")
#: The endings that kohya and LyCORIS write: of each factor, the first.
KOHYA_ENDINGS = {ours: theirs for theirs, ours in reversed(_FACTORS.items())}
_ENDINGS = re.compile(
    r"(?P<module>.+?)\.(?P<factor>"
    + "|".join(map(re.escape, sorted(_FACTORS, key=len, reverse=True)))
    + r")",
    re.DOTALL,
)
#: The diffusers attention processors of 2023 carry the projection's name:
#: "attn1.processor.to_q_lora.up.weight".
_PROCESSOR = re.compile(
    r"^(?P<block>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<factor>up|down)\.weight$"
)
#: ... and for the text encoder "self_attn.to_q_lora.up.weight".
_TEXT_PROCESSOR = re.compile(
    r"^(?P<block>.+\.self_attn)\.to_(?P<projection>q|k|v|out)_lora\.(?P<factor>up|down)\.weight$"
)
#: What stands before the names of CLIP's text encoder, flattened; then follows ``text_model``, or nothing as
#: with transformers from version 5.6 on. ComfyUI puts ``transformer`` between them.
_TEXT_STARTS = (
    "lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "lycoris_", "text_encoder_", "clip_l_",
    "text_encoders_clip_l_", "cond_stage_model_", "base_model_model_text_encoder_", "base_model_model_", "",
)  # fmt: skip
_TEXT_INNER = ("transformer_text_model_", "text_model_", "transformer_", "")
#: CLIP's modules by their names inside of it, flattened.
_TEXT_MODULE = re.compile(
    r"encoder_layers_\d+_(?:self_attn_(?:[qkv]|out)_proj|mlp_fc[12]|layer_norm[12])"
    r"|embeddings_(?:token|position)_embedding|final_layer_norm"
)
#: What stands before module names, by part; flattened.
_PREFIXES = {
    "unet": (
        "lora_unet_",
        "lycoris_unet_",
        "base_model_model_unet_",
        "base_model_model_diffusion_model_",
        "model_diffusion_model_",
        "diffusion_model_",
        "unet_",
        "lycoris_",
        "base_model_model_",
        "",
    ),
    "text_encoder": tuple(start + inner for inner in _TEXT_INNER for start in _TEXT_STARTS),
}


def split_adapter(file: WeightFile, modules: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Change]]:
    """Assign an adapter's keys to modules.

    Args:
        file: the adapter's weights.
        modules: names of the modules with weights, by part ("unet", "text_encoder"), as diffusers names them.

    Returns:
        By part, the change of each module.

    Raises:
        UserError: keys that belong to no module, or factors that are of no known form together.
    """
    from .change import Change, rank, refuse_unknown_form  # who only asks what a file is needs no PyTorch

    lookup = {part: _lookup(names, part) for part, names in modules.items()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in modules}
    unknown = []
    for key, tensor in _factors(file).items():
        module, factor = split_key(key)
        place = _place(module, lookup) if module else None
        if place is None:
            unknown.append(key)
        else:
            part, name = place
            if factor in found[part].setdefault(name, {}):
                raise UserError(
                    f"{file.path}: {printable(key, 120)} and another key both hold the {factor} of"
                    f" {part}.{name}; the file is damaged"
                )
            found[part][name][factor] = tensor
    if unknown:
        raise UserError(
            f"{file.path}: {len(unknown)} of {len(file.tensors)} keys match no module of this model, such as"
            f" {', '.join(printable(key, 120) for key in unknown[:3])}; the file is made for another base or"
            " of an unknown kind (see `bdm inspect`)"
        )
    for part, changes in found.items():
        for name, factors in changes.items():
            refuse_unknown_form(factors, f"{file.path}: {part}.{name}")
    settings = PeftSettings.of(file)
    return {
        # Factors are small and are used again whenever a strength changes: not as views of a file that may be
        # rewritten.
        part: {
            name: Change(
                {key: t.clone() for key, t in factors.items()}, settings.scale(part, name, rank(factors))
            )
            for name, factors in changes.items()
        }
        for part, changes in found.items()
    }


def _factors(file: WeightFile) -> dict[str, Tensor]:
    """An adapter's tensors, and its plain numbers as tensors; without the embeddings packed beside it.

    Raises:
        UserError: a factor that is neither a tensor nor a number.
    """
    import torch

    factors = {key: file.tensors[key] for key in without_bundled(file.tensors)}
    texts = {key: text for key, text in file.metadata.items() if is_factor(key)}
    for key, text in texts.items():
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if split_key(key)[1] not in _NUMBERS or not math.isfinite(number):
            raise UserError(
                f"{file.path}: {printable(key, 120)} is {printable(text, 40)!r}; give a number, or a tensor"
                " of one"
            )
        factors[key] = torch.tensor(number, dtype=torch.float64)
    for key, kind in file.others.items():
        if is_factor(key) and key not in factors:
            raise UserError(
                f"{file.path}: {printable(key, 120)} is of the kind {kind}, which is not read; give a tensor"
                " or a number"
            )
    return factors


def is_factor(key: str) -> bool:
    """Whether a key is that of an adapter's factor."""
    factor = split_key(key)[1]
    # Any layer's weight ends like LyCORIS's (IA)3.
    return factor not in ("", "gain") or (factor == "gain" and key.startswith(("lora_", "lycoris_")))


def split_key(key: str) -> tuple[str, str]:
    """(module, factor) of an adapter's key; both "" if it is not one."""
    processor = _PROCESSOR.fullmatch(key)
    if processor:
        projection = processor["projection"].replace("to_out", "to_out.0")
        return f"{processor['block']}.{projection}", processor["factor"]
    processor = _TEXT_PROCESSOR.fullmatch(key)
    if processor:
        return f"{processor['block']}.{processor['projection']}_proj", processor["factor"]
    ending = _ENDINGS.fullmatch(key)
    return (ending["module"], _FACTORS[ending["factor"]]) if ending else ("", "")


def text_keys(keys: Iterable[str]) -> list[str]:
    """The keys of an adapter that change CLIP's text encoder, or bundle embeddings for it.

    They are told by their names alone, so that a pipeline without such an encoder can leave them out.
    """
    return [key for key in keys if key.startswith(BUNDLED) or _is_text(split_key(key)[0] or key)]


def _is_text(module: str) -> bool:
    name = flat(module)
    return any(
        name.startswith(prefix) and _TEXT_MODULE.fullmatch(name[len(prefix) :])
        for prefix in _PREFIXES["text_encoder"]
    )


def _lookup(names: Iterable[str], part: str) -> dict[str, str]:
    """Flattened module names -> module names, under the original layout's names too."""
    names = list(names)
    table = {flat(name): name for name in names}
    if part == "unet":
        pairs = UNetBuild.of([f"{name}.weight" for name in names]).unet()
        for ours, theirs in pairs:
            inside = [name for name in names if name == theirs or name.startswith(f"{theirs}.")]
            table |= {flat(ours + name[len(theirs) :]): name for name in inside}
    return table


def _place(module: str, lookup: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    name = flat(module)
    for part, table in lookup.items():
        for prefix in _PREFIXES[part]:
            if name.startswith(prefix) and name[len(prefix) :] in table:
                return part, table[name[len(prefix) :]]
    return None


def adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """What trainers note in an adapter's header, under names of ours: base, rank, alpha, trigger words."""
    noted = {
        "base": "ss_base_model_version",
        "rank": "ss_network_dim",
        "alpha": "ss_network_alpha",
        "title": "modelspec.title",
    }
    facts = {ours: metadata[theirs] for ours, theirs in noted.items() if metadata.get(theirs)}
    words = metadata.get("modelspec.trigger_phrase", "")
    if not words and metadata.get("ss_tag_frequency"):
        try:
            tags = json.loads(metadata["ss_tag_frequency"])
            counts: dict[str, int] = {}
            for folder in tags.values():
                for tag, count in folder.items():
                    counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
            words = ", ".join(sorted(counts, key=lambda tag: -counts[tag])[:5])
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            words = ""
    return facts | ({"trigger words": words} if words else {})
