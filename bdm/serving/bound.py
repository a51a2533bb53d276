"""How many drawings a call may join, by memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from ..drawing.request import Request
from ..errors import UserError
from ..formats.weights import DTYPES
from ..plan.drawing_memory import draw_stages

#: Share of the memory that is free which joined calls may take.
_SHARE = 0.8


def batch_bound(request: Request, latents: tuple[int, int], device: torch.device, most: int) -> int:
    """Drawings of a size that fit into a call, worked out from shapes (see ``bdm.plan.drawing_memory``).

    Args:
        request: complete; whose model and ControlNets they are.
        latents: their height and width.
        device: that draws.
        most: never more than these.

    Returns:
        At least 1; ``most`` where the model's shapes or the memory cannot be told.
    """
    free, model = free_memory(device), request.model and request.model.source
    if free is None or model is None or request.precision is None:
        return most
    controls = sum(plugin.kind == "controlnet" for plugin in request.plugins)
    try:
        one, two = (_working(model, latents, count, request.precision, controls) for count in (1, 2))
    except UserError:  # a system of another kind
        return most
    each = max(1, two - one)
    return max(1, min(most, 1 + int((_SHARE * free - one) // each)))


@functools.cache
def _working(model: Path, latents: tuple[int, int], count: int, precision: str, controls: int) -> int:
    """Bytes of a step beside the weights."""
    native = str(model / "native_text_encoder")
    return draw_stages(str(model), native, latents, count, DTYPES[precision], controls)["step"].working


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where a device computes; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    said: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(said["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in said else None
