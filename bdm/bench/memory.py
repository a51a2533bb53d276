"""Peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> int:
    """Peak bytes while ``run`` works, with everything that was there before.

    Of the GPU ("cuda"), or resident ("cpu").
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    # Linux: the peak starts again from what is resident now. Elsewhere building the models counts too, for
    # every side alike.
    with suppress(OSError):
        _RESET.write_text("5")
    run()
    return resident_peak()


def resident_peak() -> int:
    """Peak resident bytes of this process, since its start or since the peak was reset."""
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
