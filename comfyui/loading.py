"""Branches and native text encoders in ComfyUI's hands: loaded, held, and moved between devices by it."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from bdm import BranchModel, NativeTextEncoder
from bdm.errors import UserError

from .folders import BRANCHES, TEXTS, find_model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Held(nn.Module):
    """A model in a plain module.

    ComfyUI sets the attribute ``device`` of whatever it moves, which diffusers' models compute themselves.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)


class WholePatcher(ModelPatcher):
    """Loads a model whole or not at all.

    Where memory is short, ComfyUI leaves layers on the CPU and lets its own kinds of layers fetch their
    weights as they compute. These are PyTorch's, which cannot.
    """

    def load(self, *args: Any, **kwargs: Any) -> Any:
        # device_to, lowvram_model_memory, force_patch_weights, full_load
        kwargs.update(zip(("device_to", "lowvram_model_memory", "force_patch_weights"), args, strict=False))
        return super().load(**kwargs | {"full_load": True})

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Nothing is freed by parts, so ComfyUI takes the whole model off the device."""
        return 0


def load_branch(name: str, dtype: str) -> WholePatcher:
    """Load a branch by its name in ``models/bdm_branches``.

    Args:
        name: as listed.
        dtype: a key of ``DTYPES``, or "auto" for what ComfyUI gives a UNet on this device.

    Raises:
        UserError: no such branch, or files that are damaged or of another kind.
    """
    device = management.get_torch_device()
    chosen = _chosen(dtype, lambda: management.unet_dtype(device=device, model_params=-1))
    branch = BranchModel.from_pretrained(find_model(BRANCHES, name), dtype=chosen)
    return WholePatcher(Held(branch), device, management.unet_offload_device())


def load_native_text(name: str, dtype: str) -> WholePatcher:
    """Load a native text encoder by its name in ``models/bdm_text``.

    Args:
        name: as listed.
        dtype: a key of ``DTYPES``, or "auto" for what ComfyUI gives a text encoder on this device.

    Raises:
        UserError: no such encoder, or files that are damaged or of another kind.
    """
    device = management.text_encoder_device()
    chosen = _chosen(dtype, lambda: management.text_encoder_dtype(device))
    encoder = NativeTextEncoder.from_pretrained(find_model(TEXTS, name), dtype=chosen)
    return WholePatcher(Held(encoder), device, management.text_encoder_offload_device())


def _chosen(dtype: str, automatic: Any) -> torch.dtype:
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}")
    chosen = automatic() if dtype == "auto" else DTYPES[dtype]
    # ComfyUI may be told to keep weights in 8 bits, in which nothing here computes.
    return chosen if chosen in DTYPES.values() else torch.float32
