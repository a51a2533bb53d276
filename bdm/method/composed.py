"""Composed guidance: the native and the English prompt each pull with a strength of their own.

A guided step as the paper has it knows one difference, that of both prompts together from both negatives. The
score of two independent conditions is the sum of two differences ("Compositional Visual Generation with
Composable Diffusion Models", arXiv 2206.01714, equation 11):

    eps = eps(-, -) + w_native (eps(native, -) - eps(-, -)) + w_english (eps(-, english) - eps(-, -))

where "-" stands for the negative prompt of a language. It costs one more part of the batch.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UserError
from .condition import GUIDED, Part
from .step import OneResult, UNetCall

#: What the parts of a composed step are drawn for, natively: nothing, the native prompt, the English one.
COMPOSED: tuple[Part, ...] = ("negative", "positive", "negative")
#: From which half of a guided batch each of them takes its latents, English text and what else it is given.
_HALVES = (0, 0, 1)


class ComposedGuidance:
    """Turns guided steps into composed ones; a step without guidance stays as it is.

    The pipeline goes on to compute ``negative + w_native (positive - negative)`` of what it is given, so the
    positive half becomes ``eps(native, -) + ratio (eps(-, english) - eps(-, -))``.

    Args:
        ratio: w_english / w_native, with w_native the pipeline's guidance scale.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._rows: Tensor | None = None
        self._text = OneResult()

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Nothing: it changes what the UNet is given."""

    def before(self, call: UNetCall) -> None:
        """Make three parts of the two.

        Raises:
            UserError: parts of another guidance than the plain one, or English features that are not one row
                for each sample (AnimateDiff's).
        """
        self._rows = None
        if call.parts == GUIDED[1:]:
            return
        if call.parts != GUIDED:
            raise UserError(
                f"composed guidance needs a pair of a negative and a positive part, and this pipeline stacks"
                f" {', '.join(map(str, call.parts))}; leave english_guidance out"
            )
        batch, device = len(call.sample), call.sample.device
        if not isinstance(call.text, Tensor) or len(call.text) != batch:
            raise UserError(
                f"composed guidance needs English text features for each of the {batch} samples of a step,"
                " and this pipeline gives the UNet others (for each frame, perhaps); leave it out"
            )
        rows = torch.arange(batch, device=device).view(2, -1)[list(_HALVES)].flatten()

        def spread(value: Tensor) -> Tensor:
            return value.index_select(0, rows) if value.ndim and len(value) == batch else value

        text, ours = call.text, self._text.of(call.text, spread)
        call.values = {
            name: ours if value is text else pytree.tree_map_only(Tensor, spread, value)
            for name, value in call.values.items()
        }
        call.parts, self._rows = COMPOSED, rows

    def after(self, output: Any) -> Any:
        """The two halves that a pipeline expects."""
        rows, self._rows = self._rows, None
        if rows is None:
            return output

        def join(value: Tensor) -> Tensor:
            if not value.ndim or len(value) != len(rows):
                return value
            nothing, native, english = value.chunk(3)
            return torch.cat([nothing, native + self._ratio * (english - nothing)])

        return pytree.tree_map_only(Tensor, join, output)
