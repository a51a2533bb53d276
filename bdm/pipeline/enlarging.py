"""Enlarging what a first pass has drawn: its latents, or its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError, quoted
from ..models.upscaler import Upscaler
from .canvas import as_tensor

#: How latents are enlarged, by A1111's names.
LATENT = {"latent": "bilinear", "latent nearest": "nearest-exact", "latent bicubic": "bicubic"}
#: How pictures are, without a network.
PICTURE = ("lanczos", "nearest")


def is_latent(upscaler: Any) -> bool:
    """Whether an upscaler works on latents.

    Raises:
        UserError: it is none.
    """
    if isinstance(upscaler, str) and upscaler.lower() in LATENT:
        return True
    if isinstance(upscaler, str) and not (upscaler.lower() in PICTURE or Path(upscaler).suffix):
        known = ", ".join((*LATENT, *PICTURE))
        raise UserError(f"upscaler {quoted(upscaler)}; known are {known}, or a file of a network")
    if not isinstance(upscaler, str | Path | Upscaler):
        raise UserError(
            f"upscaler {quoted(upscaler)}; give a name, a file, or a bdm.models.upscaler.Upscaler"
        )
    return False


def enlarge_latents(latents: Tensor, size: tuple[int, int], upscaler: str, device: Any = None) -> Tensor:
    """Latents (N, C, h, w) of another height and width."""
    return interpolate(latents, size, mode=LATENT[upscaler.lower()])


def enlarge_pictures(pictures: Tensor, size: tuple[int, int], upscaler: Any, device: Any = "cpu") -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of another height and width.

    A network enlarges them as often as is needed; what is more than wanted is taken back.
    """
    if isinstance(upscaler, str) and upscaler.lower() == "nearest":
        return interpolate(pictures, size, mode="nearest-exact")
    if not (isinstance(upscaler, str) and upscaler.lower() == "lanczos"):
        network = upscaler if isinstance(upscaler, Upscaler) else Upscaler(upscaler, device)
        for _ in range(4 if network.scale > 1 else 1):
            if pictures.shape[-2] < size[0] or pictures.shape[-1] < size[1] or network.scale == 1:
                pictures = network(pictures)
    return _lanczos(pictures, size)


def _lanczos(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pictures.shape[-2:]) == size:
        return pictures

    height, width = size
    resized = [
        Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS)
        for array in (pictures * 255).round().byte().movedim(1, -1).cpu().numpy()
    ]
    return torch.stack([as_tensor(picture) for picture in resized]).to(pictures)
