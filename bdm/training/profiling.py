"""A window of a run's steps, looked at operator by operator."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write, write_text, writing_to
from .observing import Observer

logger = logging.getLogger("bdm")

#: Operators in the table of those that take longest.
ROWS = 40


class ProfileWindow(Observer):
    """Writes a trace of some steps, for chrome://tracing or Perfetto, and a table of the slowest operators.

    Args:
        folder: is given ``step-FIRST-LAST.json`` and ``.txt``.
        first: steps that this process does before; they warm up.
        steps: that are looked at.
        device: kind of the device, "cpu" or "cuda".
    """

    def __init__(self, folder: Path, first: int, steps: int, device: str) -> None:
        self._folder, self._first, self._steps, self._device = folder, first, steps, device
        self._done, self._at = 0, 0
        self._profile: Any = None

    def before(self, step: int) -> None:
        if self._done == self._first:
            self._start(step)
        elif self._done == self._first + self._steps:
            self.close()
        self._done, self._at = self._done + 1, step

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._begun = step
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def close(self) -> None:
        """Write what was seen; a run that ends in the window has a shorter one."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._folder / f"step-{self._begun + 1:08d}-{self._at + 1:08d}.json"
        order = "self_cuda_time_total" if self._device == "cuda" else "self_cpu_time_total"
        with writing_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                profile.export_chrome_trace(str(partial))
            table = profile.key_averages().table(sort_by=order, row_limit=ROWS)
            write_text(path.with_suffix(".txt"), table)
        logger.warning("the profile is in %s", path)
