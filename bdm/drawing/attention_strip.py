"""A labelled strip: a picture, and what each word of its prompts looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from ..pipeline.attention import record_attention
from ..text.rules import A1111, PromptRules
from .grid import labelled_grid
from .painter import NONE_DRAWN, Drawn, Painter
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


def draw_with_strip(
    painter: Painter,
    request: Request,
    words: Sequence[str] | None = None,
    words_en: Sequence[str] | None = None,
    rules: PromptRules = A1111,
) -> tuple[Drawn, Image.Image]:
    """Draw a request, and the strip of what its words looked at; the picture is what it is without.

    Args:
        painter: that draws.
        request: complete (see ``bdm.drawing.complete``).
        words: of the native prompt; by default what stands between punctuation.
        words_en: of the English prompt; by default all.
        rules: by which the prompts are read.

    Raises:
        UserError: a word that is in no prompt, prompts that change from step to step, a picture that is none.
    """
    pipe = painter.pipeline(request)
    with record_attention(pipe) as found:
        (drawn,) = painter.draw([request])
    if drawn is None:
        raise UserError(NONE_DRAWN.format("the picture"))
    native = found.native_words(request.prompt, words, rules) if request.prompt else {}
    english = found.english_words(request.prompt_en, words_en, rules) if request.prompt_en else {}
    return drawn, attention_strip(drawn.image, native, english, max(1, _SIDE // max(drawn.image.size)))


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
