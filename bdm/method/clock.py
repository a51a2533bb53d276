"""Which denoising step a call of the UNet belongs to, told by its timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError

#: Gives the number of denoising steps T, or the timesteps of all of them, once the pipeline knows it.
Steps = Callable[[], "int | Sequence[float] | Tensor"]


class StepClock:
    """Counts denoising steps by the timesteps that a pipeline gives, not by calls of the UNet.

    All calls at one timestep are one step: the views of a panorama, both evaluations of a second-order
    sampler. A timestep against the run of those before begins anew: free-init's next round.

    Args:
        steps: gives the number of steps T or the pipeline's timesteps; None where nothing asks for the step.
    """

    def __init__(self, steps: Steps | None) -> None:
        self._steps = steps
        self._index = 0
        self._direction = 0.0
        self._last: float | None = None
        self._table: tuple[Tensor, list[float]] | None = None

    def tick(self, timestep: Tensor | float) -> int:
        """The step i (from 0) of a call at this timestep: a number, or a tensor of equal ones."""
        value = self._value(timestep)
        known = self._known()
        if known is not None and value in known:
            self._index = known.index(value)
        elif self._last is not None and value != self._last:
            direction = 1.0 if value > self._last else -1.0
            self._index = self._index + 1 if direction * self._direction >= 0.0 else 0
            # A round that begins anew leaps back once and then goes on as before.
            self._direction = self._direction or direction
        self._last = value
        return self._index

    def total(self) -> int:
        """The number of steps T.

        Raises:
            UserError: nobody has told.
        """
        if self._steps is None:
            raise UserError("a window needs the number of steps; give steps= with the condition")
        known = self._known()
        return len(known) if known is not None else int(self._steps())  # pyright: ignore[reportArgumentType]

    def _known(self) -> list[float] | None:
        """The timesteps in their order, each once."""
        table = self._read_table()
        return None if table is None else list(dict.fromkeys(table[1]))

    def _read_table(self) -> tuple[Tensor, list[float]] | None:
        """The pipeline's timesteps and their values, read off the device once for all steps."""
        if self._table is None and self._steps is not None:
            given = self._steps()
            if not isinstance(given, int):
                tensor = given if isinstance(given, Tensor) else torch.tensor(list(given))
                self._table = (tensor, tensor.tolist())
        return self._table

    def _value(self, timestep: Tensor | float) -> float:
        """A timestep as a number; where the pipeline's own are known, without waiting for the device."""
        if not isinstance(timestep, Tensor):
            return float(timestep)
        table = self._read_table()
        if table is not None and timestep.numel() == 1 and timestep.device == table[0].device:
            memory, offset = table[0].untyped_storage(), timestep.storage_offset() - table[0].storage_offset()
            if timestep.untyped_storage().data_ptr() == memory.data_ptr() and 0 <= offset < len(table[1]):
                return table[1][offset]
        return float(timestep.flatten()[0])


def in_window(step: int, total: Callable[[], int], start: float, end: float) -> bool:
    """Whether a side network is on in step i of T.

    Off where i/T < start or (i+1)/T > end, as in the official inference. ``total`` gives T and is only asked
    if the window restricts.
    """
    if start <= 0.0 and end >= 1.0:
        return True
    count = total()
    return not (step / count < start or (step + 1) / count > end)


def check_window(start: float, end: float, what: str) -> None:
    """Refuse a window that is not 0 <= start <= end <= 1.

    Raises:
        UserError: names ``what`` it is the window of.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise UserError(f"{what} window {start} to {end}: both must lie in [0, 1], start before end")
