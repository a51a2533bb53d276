"""What a mapping of names to tensors is, from its names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .adapter import is_factor, split_key
from .bundled import without_bundled
from .families import family_of_names

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal[
    "checkpoint", "unet", "vae", "text encoder", "controlnet", "branch", "adapter", "embedding", "unknown"
]

#: Width of the text features that a UNet, ControlNet, adapter or embedding of each base reads.
_BASES = {768: "SD1.5", 1024: "SD2", 1280: "SDXL", 2048: "SDXL"}
#: Vectors of an embedding at most: the positions of CLIP's text encoder without its markers.
MOST_VECTORS = 75
#: A place in a network, as only trainers write it before a factor.
_PLACE = re.compile(r"(?:blocks|block|layers)[._]\d+[._]|(?:mid|middle)_block[._]")


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        kind: the role it plays in a pipeline; an adapter is a LoRA or one of its relatives.
        base: the model family it is made for: "SD1.5", "SD2", "SDXL", "SD3", "FLUX"; "SD1.5 inpainting" and
            so on for modified UNets; "width N" for a small model that only differs from SD1.5 in its text
            width; "" if nothing tells.
        layout: whose names it uses: "original", "diffusers", "kohya", "A1111", "BDM".
    """

    kind: Kind
    base: str
    layout: str

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.base, self.kind, f"({self.layout} layout)" if self.layout else ""))
        )


def identify(tensors: Mapping[str, Tensor]) -> FileKind:
    """Say what a mapping of names to tensors (possibly on the meta device) is."""
    tensors = {key: tensors[key] for key in without_bundled(tensors)} or tensors
    kind, layout = _kind(tensors)
    if kind == "embedding":  # its names are words that people choose
        return FileKind(kind, _base_of_embedding(tensors), layout)
    base = family_of_names(tensors)
    if not base and kind in ("checkpoint", "unet", "vae", "controlnet", "branch", "adapter"):
        base = _modified(tensors, kind) or base_of_width(_text_width(tensors), kind)
    return FileKind(kind, base, layout)


def _kind(tensors: Mapping[str, Tensor]) -> tuple[Kind, str]:
    keys = tensors.keys()
    if _is_one_embedding(tensors):
        return "embedding", _embedding_layout(keys)

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    # The first ControlNet files hold a whole checkpoint beside the control.
    if has("control_model.", "input_hint_block."):
        return "controlnet", "original"
    if has("model.diffusion_model.", "model_ema.diffusion_model"):
        return "checkpoint", "original"
    if has("controlnet_cond_embedding."):
        return "controlnet", "diffusers"
    if has("controlnet_down_blocks."):
        return "branch", "BDM"
    if has("string_to_param.") or "emb_params" in keys or keys == {"clip_l", "clip_g"}:
        return "embedding", _embedding_layout(keys)
    if has("conv_in.") and has("up_blocks."):
        return "unet", "diffusers"
    if has("input_blocks.") and has("output_blocks."):
        return "unet", "original"
    if has("encoder.down_blocks.", "encoder.down.", "first_stage_model."):
        return "vae", "diffusers" if has("encoder.down_blocks.") else "original"
    if has("embeddings.token_embedding.", "text_model.embeddings.", "cond_stage_model.transformer."):
        return "text encoder", "diffusers"
    split = [key for key in keys if is_factor(key)]
    few = 1 <= len(tensors) <= 2 and not any(map(_is_layer, keys))
    if few and not split and all(map(is_vectors, tensors.values())):
        return "embedding", _embedding_layout(keys)
    if split and len(split) >= len(tensors) / 2:
        return "adapter", "kohya" if has("lora_unet_", "lora_te", "lycoris_") else "diffusers"
    return "unknown", ""


def _embedding_layout(keys: Collection[str]) -> str:
    theirs = any(key in ("emb_params", "clip_l") or key.startswith("string_to_param.") for key in keys)
    return "A1111" if theirs else "diffusers"


def _is_one_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds vectors of a known width and nothing else, under whatever word their author chose.

    A layer has more rows, and an adapter holds one tensor alone only where its file is incomplete.
    """
    if len(tensors) != 1:
        return False
    ((key, tensor),) = tensors.items()
    if not is_vectors(tensor) or tensor.shape[-1] not in _BASES or _is_trainers(key):
        return False
    few = tensor.ndim == 1 or len(tensor) <= MOST_VECTORS
    return few or not (_is_layer(key) or is_factor(key))


def is_vectors(tensor: Tensor) -> bool:
    """Whether a tensor may be what a word stands for."""
    return tensor.is_floating_point() and tensor.ndim in (1, 2) and tensor.numel() > 0


def _is_layer(key: str) -> bool:
    return key.endswith((".weight", ".bias"))


def _is_trainers(key: str) -> bool:
    """Whether a key is an adapter's, as trainers write them."""
    return is_factor(key) and _PLACE.search(key) is not None


def _modified(tensors: Mapping[str, Tensor], kind: Kind) -> str:
    """The name of a UNet or VAE with other channels than SD1.5's."""
    for key in ("encoder.conv_out.weight", "first_stage_model.encoder.conv_out.weight"):
        if kind == "vae" and key in tensors and tensors[key].shape[:1] != (8,):
            return f"a model of {tensors[key].shape[0] // 2 if tensors[key].ndim else 0} latent channels"
    first = "input_blocks.0.0.weight"
    for key in (f"model.diffusion_model.{first}", f"control_model.{first}", first, "conv_in.weight"):
        if key in tensors and tensors[key].ndim == 4 and tensors[key].shape[1] != 4:
            channels = tensors[key].shape[1]
            known = {9: "SD1.5 inpainting", 8: "InstructPix2Pix"}
            return known.get(channels, f"a UNet of {channels} input channels")
    return ""


def _base_of_embedding(tensors: Mapping[str, Tensor]) -> str:
    vectors = [tensor for tensor in tensors.values() if tensor.ndim and tensor.is_floating_point()]
    widths = {tensor.shape[-1] for tensor in vectors}
    if widths == {768, 1280}:  # one for each of SDXL's text encoders
        return "SDXL"
    return base_of_width(next(iter(widths)), "embedding") if len(widths) == 1 else ""


def _text_width(tensors: Mapping[str, Tensor]) -> int | None:
    for key, tensor in tensors.items():
        if "attn2" in key and tensor.ndim >= 2 and "to_k" in key:
            if key.endswith("attn2.to_k.weight"):
                return tensor.shape[1]
            if split_key(key)[1] in ("down", "diff", "w1_b"):
                return tensor.shape[1]
    return None


def base_of_width(width: int | None, kind: Kind) -> str:
    """The base whose text features have a width; "" where a kind's width tells nothing."""
    if width is None or kind in ("branch", "vae"):  # a branch reads any native encoder
        return ""
    return _BASES.get(width, f"width {width}")
