"""What ends a run, or a step of it, early: signals and gradients that are not finite."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import append_line


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (pre-emption), so that the loop can save its state after the step it is in.

    A time limit is kept as if SIGUSR1 had come.

    Args:
        hours: until then; None for no limit.
    """

    def __init__(self, hours: float | None = None) -> None:
        self._came = 0
        self._before: dict[int, Any] = {}
        # A clock that is set does not end a run.
        self._end = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def number(self) -> int:
        """Of the signal that came; 0 before."""
        if not self._came and self._end is not None and time.monotonic() >= self._end:
            self._came = int(getattr(signal, "SIGUSR1", signal.SIGTERM))
        return self._came

    def __enter__(self) -> StopSignal:
        # Only the main thread may set handlers, and Windows has no SIGUSR1.
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._came = number


class Stopped(Exception):
    """A signal ended the run; its state is saved.

    Attributes:
        number: of the signal.
        step: steps done.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"stopped by signal {number} after step {step}; the state is saved, the same command goes on"
        )
        self.number, self.step = number, step


class SkippedSteps:
    """Counts steps whose gradients are not finite, and writes down which examples they had.

    Args:
        out: the run folder.
        limit: more end the run.
        count: how many there were before.
        key: number of an example -> what it is called.
    """

    def __init__(
        self, out: Path, limit: int, count: int = 0, key: Callable[[int], Any] = lambda index: index
    ) -> None:
        self.out, self.limit, self.count, self._key = out, limit, count, key

    def add(self, step: int, indices: list[int], write: bool = True) -> None:
        """Note a step that was left out; in the process that may ``write`` also in ``skipped.jsonl``.

        Raises:
            UserError: there are more than ``limit``.
        """
        self.count += 1
        if write:
            append_line(
                self.out / "skipped.jsonl", {"step": step + 1, "examples": [self._key(i) for i in indices]}
            )
        if self.count > self.limit:
            raise UserError(
                f"{self.count} steps had gradients that are not finite, the last at step {step + 1}; their"
                f" examples are in {self.out / 'skipped.jsonl'}: look at them, lower the learning rate, or"
                f" raise skip_limit ({self.limit})"
            )
