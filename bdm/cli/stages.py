"""What a command spends its time on, from the start of its process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


class Stages:
    """Notes when each stage of a command ends; the first begins when the process was started."""

    def __init__(self) -> None:
        self._ends: list[tuple[str, float]] = []

    def end(self, name: str) -> None:
        """The stage of this name ends now."""
        self._ends.append((name, process_age()))

    def __str__(self) -> str:
        starts = [0.0, *(end for _, end in self._ends)]
        parts = [
            f"{name} {end - start:.2f} s" for start, (name, end) in zip(starts, self._ends, strict=False)
        ]
        return f"{starts[-1]:.2f} s from the start: " + ", ".join(parts)

    def show(self) -> None:
        """Print the stages beside what the command gives."""
        print(self, file=sys.stderr)


def process_age() -> float:
    """Seconds since this process was started; where the system does not say, since Python began to count."""
    try:
        # The 22nd field is the start in clock ticks after the machine's; the second may hold blanks, and ends
        # with a bracket.
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return time.perf_counter()
