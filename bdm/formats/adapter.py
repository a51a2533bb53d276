"""Adapters (the LoRA family): which weights a file changes, whatever its key names.

An adapter's file holds, for some modules of the UNet and of CLIP's text encoder, the factors of a change of
their weight (see ``bdm.formats.change``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
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
#: The endings that kohya and LyCORIS write: of each factor, the first.
KOHYA_ENDINGS = {ours: theirs for theirs, ours in reversed(_FACTORS.items())}
_ENDINGS = re.compile(
    r"^(?P<module>.+?)[._](?P<factor>"
    + "|".join(map(re.escape, sorted(_FACTORS, key=len, reverse=True)))
    + r")$"
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
#: What stands before module names, by part; flattened, longest first.
_PREFIXES = {
    "unet": (
        "lora_unet_",
        "lycoris_unet_",
        "base_model_model_unet_",
        "diffusion_model_",
        "unet_",
        "lycoris_",
        "base_model_model_",
        "",
    ),
    "text_encoder": (
        "base_model_model_text_model_",
        "lora_te_text_model_",
        "lora_te1_text_model_",
        "lycoris_te_text_model_",
        "clip_l_text_model_",
        "text_encoder_text_model_",
        "lycoris_text_model_",
        "lora_te_",
        "text_encoder_",
    ),
}


def split_adapter(file: WeightFile, modules: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Change]]:
    """Assign an adapter's keys to modules.

    Args:
        file: the adapter's weights.
        modules: names of the modules with weights, by part ("unet", "text_encoder"), as diffusers names them.

    Returns:
        By part, the change of each module.

    Raises:
        UserError: keys that belong to no module.
    """
    lookup = {part: _lookup(names, part) for part, names in modules.items()}
    from .change import Change, rank  # what only says what a file is does without PyTorch

    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in modules}
    unknown = []
    for key, tensor in file.tensors.items():
        if key.startswith("bundle_emb."):  # embeddings that some trainers pack beside the adapter
            continue
        module, factor = split_key(key)
        place = _place(module, lookup) if module else None
        if place is None:
            unknown.append(key)
        else:
            part, name = place
            found[part].setdefault(name, {})[factor] = tensor
    if unknown:
        raise UserError(
            f"{file.path}: {len(unknown)} of {len(file.tensors)} keys match no module of this model, such as"
            f" {', '.join(unknown[:3])}; the file is made for another base or of an unknown kind (see `bdm"
            " inspect`)"
        )
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


def split_key(key: str) -> tuple[str, str]:
    """(module, factor) of an adapter's key; both "" if it is not one."""
    processor = _PROCESSOR.match(key)
    if processor:
        projection = processor["projection"].replace("to_out", "to_out.0")
        return f"{processor['block']}.{projection}", processor["factor"]
    processor = _TEXT_PROCESSOR.match(key)
    if processor:
        return f"{processor['block']}.{processor['projection']}_proj", processor["factor"]
    ending = _ENDINGS.match(key)
    return (ending["module"], _FACTORS[ending["factor"]]) if ending else ("", "")


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
