"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..parallel.whole import Collect, local, split_as
from .copying import Gate


class AveragedWeights:
    """Keeps ``average = decay * average + (1 - decay) * weights`` beside the weights.

    In the first steps the decay is smaller, (1 + n) / (10 + n), so that the random start is soon forgotten.

    Args:
        parameters: the trained weights.
        decay: of the average; 0 keeps the last weights.
        on_cpu: whether the average is kept in the CPU's memory, twice its size, instead of beside the
            weights. Weights are copied there and averaged while training goes on.
        gate: holds up changes of the average and the weights.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        decay: float,
        on_cpu: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self._gate = gate or Gate()
        self._aside = Aside(self.parameters) if on_cpu else None
        self._average = [_on_cpu(p) if on_cpu else p.detach().clone() for p in self.parameters]

    @property
    def average(self) -> list[Tensor]:
        """The average; of weights that are split, on the CPU, this process's pieces."""
        if self._aside is not None:
            self._aside.wait()
        return self._average

    @torch.no_grad()
    def step(self) -> None:
        """Take the weights after an optimizer step into the average."""
        self._gate.passed()
        self.steps += 1
        update = get_ema_multi_avg_fn(min(self.decay, (1 + self.steps) / (10 + self.steps)))
        if self._aside is None:
            update(self._average, [p.detach() for p in self.parameters], None)
        else:
            self._aside.copy_and(lambda weights: update(self._average, weights, None))

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
        self._gate.passed()
        # In place, one tensor at a time: weights that are split over processes or live in a flat buffer must
        # stay where they are.
        for parameter, average in zip(self.parameters, self.average, strict=True):
            here = parameter.detach() if self._aside is None else local(parameter.detach())
            own = here.clone()
            here.copy_(average)
            average.copy_(own)

    @torch.no_grad()
    def set(self, number: int, value: Tensor) -> None:
        """Let the average of a parameter be a tensor that is kept as the parameter is."""
        self._gate.passed()
        self.average[number].copy_(value if self._aside is None else local(value))

    def collected(self, collect: Collect) -> dict[str, Any]:
        """What a run needs to go on, with what ``collect`` makes of its tensors; joint work."""
        pairs = zip(self.average, self.parameters, strict=True)
        # One at a time: all of them at once may be more than the device can hold.
        average = [collect(split_as(a, p) if self._aside else a) for a, p in pairs]
        return {"steps": self.steps, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, whose tensors are kept as the parameters are."""
        self.steps = state["steps"]
        for number, _ in enumerate(self.parameters):
            self.set(number, state["average"][number])


class Aside:
    """Weights that are copied to the CPU, and what is done with them there while training goes on.

    Args:
        parameters: the weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._copies = [_on_cpu(p) for p in parameters]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._work: Future[None] | None = None

    def copy_and(self, use: Any) -> None:
        """Copy the weights as they are now, and call ``use`` with the copies when they are there.

        The copies of before must have been used: the next step waits for that, not this one.
        """
        self.wait()
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(local(parameter.detach()), non_blocking=True)
        copied = torch.cuda.Event() if any(copy.is_pinned() for copy in self._copies[:1]) else None
        if copied is not None:
            copied.record()
        self._work = self._pool.submit(self._use, use, copied)

    @torch.no_grad()
    def _use(self, use: Any, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        use(self._copies)

    def wait(self) -> None:
        """Return when the copies were used.

        Raises:
            Exception: as ``use`` raised it.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()


def _on_cpu(parameter: Tensor) -> Tensor:
    """A copy of this process's piece; in memory to which a GPU writes by itself, where there is one."""
    piece = local(parameter.detach())
    copy = torch.empty_like(piece, device="cpu", pin_memory=piece.is_cuda)
    return copy.copy_(piece)
