"""Restart sampling (arXiv 2306.14878): on the way down, some noise is put back and the way is gone again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .sigma_schedules import Levels, karras

#: Between which levels of noise the way is gone again: the paper's for SD1.5, as A1111 has them.
LOWER, UPPER = 0.1, 2.0


def restart_levels(n: int, trained: Levels) -> list[tuple[float, float]]:
    """Where each of n steps begins and ends, with A1111's numbers of restarts.

    None below 20 steps, one of 9 steps below 36, then two of n / 4 steps each. The ways down, the first and
    those again, have Karras's levels.
    """
    again, times = (0, 0) if n < 20 else (9, 1) if n < 36 else (n // 4, 2)
    levels = np.append(karras(n - again * times, trained), 0.0)
    steps = list(zip(levels[:-1], levels[1:], strict=True))
    if not times:
        return steps
    low = int(np.abs(levels - LOWER).argmin())
    high = int(np.abs(levels - UPPER).argmin())
    way = karras(again + 1, levels[[low, high]])
    return steps[:low] + times * list(zip(way[:-1], way[1:], strict=True)) + steps[low:]


class Restarting:
    """Heun's method for steps of which one may begin above where the last one ended."""

    sigmas: torch.Tensor
    step_index: int | None
    state_in_first_order: bool

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As in diffusers; noise comes from ``generator``."""
        parent: Any = super()
        output = parent.step(model_output, timestep, sample)
        reached = self.step_index
        if self.state_in_first_order and reached is not None and 0 < reached < len(self.sigmas):
            added = self.sigmas[reached] ** 2 - self.sigmas[reached - 1] ** 2
            if added > 0:
                latents = output.prev_sample
                noise = randn_tensor(
                    latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
                )
                output.prev_sample = latents + noise * added.sqrt()
        return output if return_dict else (output.prev_sample, output.pred_original_sample)
