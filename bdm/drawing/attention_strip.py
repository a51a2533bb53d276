"""A labelled strip: a picture, and what each word of its prompts looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError, quoted
from ..pipeline.attention import Attention
from ..pipeline.prompts import told
from .grid import labelled_grid
from .request import Request

#: Up to which side a picture is enlarged in its strip, so that its maps can be read.
_SIDE = 128

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


def recorded_strip(
    found: Attention, picture: Image.Image, request: Request, words: Sequence[str] = ()
) -> Image.Image:
    """The strip of a picture that was drawn while attention was recorded.

    Args:
        found: what was recorded.
        picture: that was drawn.
        request: complete, that drew it.
        words: of either prompt; without any, what stands between punctuation in the native one and all words
            of the English one. A prompt that is not said has no maps.

    Raises:
        UserError: a word that is in no prompt, or no word is in any.
    """
    prompt, prompt_en = told(request.prompt, request.prompt_en, request.rules, found.pipe.plugins)
    said = (prompt if found.native.sums else "", "" if request.world == 0 else prompt_en)
    readers = (found.native_words, found.english_words)
    maps: list[Mapping[str, Tensor]] = []
    left = list(words)
    for text, read in zip(said, readers, strict=True):
        chosen = [word for word in words if word.lower() in text.lower()]
        left = [word for word in left if word not in chosen]
        there = text and (chosen or not words)
        maps.append(read(text, chosen or None, request.rules) if there else {})
    if left:
        raise UserError(
            f"the word {quoted(left[0])} is in no prompt that is said; give words that stand in"
            f" {' or '.join(quoted(text) for text in said if text) or 'one'}"
        )
    if not any(maps):
        raise UserError("no prompt says a word, so there is no attention to show; give a prompt")
    return attention_strip(picture, *maps, scale=max(1, _SIDE // max(picture.size)))


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
