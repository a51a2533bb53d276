"""A labelled strip: a picture, and what each word of its prompts looked at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .grid import labelled_grid

#: Colours of little and of much attention, RGB in [0, 1], and how much of the picture is seen beneath.
_LOW, _HIGH, _SEEN = (0.05, 0.05, 0.35), (1.0, 0.85, 0.1), 0.35


def attention_strip(
    picture: Image.Image, native: Mapping[str, Tensor], english: Mapping[str, Tensor], scale: int = 1
) -> Image.Image:
    """Lay a picture and its words' maps side by side, the branch's in front of the backbone's.

    Args:
        picture: that was drawn.
        native: (h, w) maps of words of the native prompt (see ``bdm.pipeline.attention``).
        english: likewise of the English one.
        scale: enlargement of the picture and its maps.

    Returns:
        The strip; under each picture stands its word, each map in colours from its least to its most.
    """
    maps = [*native.values(), *english.values()]
    pictures = [picture.convert("RGB"), *(overlay(picture, each) for each in maps)]
    return labelled_grid(pictures, ["", *native, *english], columns=len(pictures), scale=scale)


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """A picture under a map (h, w) in colours."""
    size = (picture.height, picture.width)
    smooth = interpolate(attention[None, None].float(), size, mode="bicubic").clamp(
        attention.min(), attention.max()
    )
    share = (smooth[0, 0] - smooth.min()) / (smooth.max() - smooth.min()).clamp(min=1e-12)
    low, high = torch.tensor(_LOW), torch.tensor(_HIGH)
    colours = low + share[..., None] * (high - low)
    grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).view(size)
    mixed = (1 - _SEEN) * colours + _SEEN * grey[..., None] / 255
    return Image.fromarray((mixed * 255).round().byte().numpy())
