"""English texts that change from step to step, and prompts that AND joins, at the UNet.

Joined prompts pull each with a weight of its own ("Compositional Visual Generation with Composable Diffusion
Models", arXiv 2206.01714, equation 11):

    eps = eps(-) + w (w_1 (eps(1) - eps(-)) + w_2 (eps(2) - eps(-)) + ...)

where "-" stands for the negative prompts and w for the guidance scale. Each costs a part of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UserError
from .clock import StepClock, Steps
from .condition import stage_of
from .hooks import hang_after, hang_before
from .step import named_arguments


class StepTexts:
    """Gives the UNet the English text of each step, and makes one result of the joined prompts.

    It acts before everything else on the UNet, so that ControlNets and branches see the batch that is
    computed, and behind everything.

    Args:
        ends: the last step, from 1, of each stage.
        weights: of the joined prompts; one of 1 joins nothing.
        positive: English features by stage and joined prompt, each (P, L, D).
        negative: by stage; None for drawings without guidance.
        images_per_prompt: consecutive samples that share a prompt.
        steps: gives the pipeline's timesteps (see ``bdm.method.clock``).
    """

    def __init__(
        self,
        ends: Sequence[int],
        weights: Sequence[float],
        positive: Sequence[Sequence[Tensor]],
        negative: Sequence[Tensor | None],
        images_per_prompt: int,
        steps: Steps,
    ) -> None:
        self._ends, self._weights = tuple(ends), tuple(weights)
        self._positive, self._negative = positive, negative
        self._images = images_per_prompt
        self._clock = StepClock(steps)
        self._given: Tensor | None = None
        self._texts: dict[tuple[int, int], Tensor] = {}
        self._rows: Tensor | None = None

    def hang_before(self, stack: ExitStack, unet: Any, controlnet: Any = None) -> None:
        """Hang what acts before the UNet, until ``stack`` closes.

        Args:
            stack: what it is hung in.
            unet: the UNet.
            controlnet: of a stock ControlNet pipeline, which gives it the text apart.
        """
        hang_before(stack, unet, self._before, first=True)
        if controlnet is not None:
            hang_before(stack, controlnet, self._before_controlnet, first=True)

    def hang_after(self, stack: ExitStack, unet: Any) -> None:
        """Hang what acts behind the UNet; everything else that does is hung before it."""
        hang_after(stack, unet, self._after)

    def _before(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = named_arguments(unet, args, kwargs)
        given, batch = values["encoder_hidden_states"], len(values["sample"])
        self._given = given if self._given is None else self._given
        if given is not self._given:
            raise UserError(
                "a callback put other English features in the place of prompts that change from step to step,"
                " or that AND joins; leave one of the two out"
            )
        joined = range(len(self._weights))
        text = self._text(values["timestep"], given, joined)
        self._rows = None
        if len(joined) > 1:
            halves = torch.arange(batch, device=values["sample"].device).chunk(2)
            rows = self._rows = torch.cat([halves[0], *[halves[1]] * len(joined)])
            values = {
                name: pytree.tree_map_only(Tensor, lambda v: _spread(v, rows, batch), value)
                for name, value in values.items()
                if name != "encoder_hidden_states"
            } | {"encoder_hidden_states": text}
        return (), values | {"encoder_hidden_states": text}

    def _before_controlnet(self, controlnet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stock ControlNet is told the first prompt, and no negative one where it guesses."""
        values = named_arguments(controlnet, args, kwargs)
        text = self._text(values["timestep"], values["encoder_hidden_states"], range(1))
        rows = len(values["encoder_hidden_states"])
        return (), values | {"encoder_hidden_states": text[len(text) - rows :]}

    def _text(self, timestep: Any, given: Tensor, joined: Sequence[int]) -> Tensor:
        """[negative, positive, ...] of a step; one tensor for all steps of a stage, so that others may keep
        what they make of it.
        """
        stage = stage_of(self._ends, self._clock.tick(timestep))
        if (stage, len(joined)) not in self._texts:
            sides = [self._negative[stage], *(self._positive[stage][k] for k in joined)]
            rows = [side.repeat_interleave(self._images, 0) for side in sides if side is not None]
            self._texts[stage, len(joined)] = torch.cat(rows).to(given)
        return self._texts[stage, len(joined)]

    def _after(self, unet: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if self._weights == (1.0,):
            return output
        parts = 1 + len(self._weights)

        def join(value: Tensor) -> Tensor:
            nothing, *each = value.chunk(parts)
            pulls = [w * (one - nothing) for w, one in zip(self._weights, each, strict=True)]
            return torch.cat([nothing, nothing + torch.stack(pulls).sum(0)])

        return pytree.tree_map_only(Tensor, join, output)


def _spread(value: Tensor, rows: Tensor, batch: int) -> Tensor:
    return value.index_select(0, rows.to(value.device)) if value.ndim and len(value) == batch else value
