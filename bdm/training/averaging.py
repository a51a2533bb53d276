"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """Keeps ``average = decay * average + (1 - decay) * weights`` beside the weights.

    In the first steps the decay is smaller, (1 + n) / (10 + n), so that the random start is soon forgotten.

    Args:
        parameters: the trained weights.
        decay: of the average; 0 keeps the last weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Take the weights after an optimizer step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.average, [p.detach() for p in self.parameters], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` block the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place, one tensor at a time: weights that are split over processes or live in a flat buffer must
        # stay where they are.
        for parameter, average in zip(self.parameters, self.average, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.steps = state["steps"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
