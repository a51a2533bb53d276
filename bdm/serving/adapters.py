"""Adapters at strengths that differ between the drawings of a batch.

In the networks' weights are the adapters of the drawing that the batch began with. For another drawing, what
its strengths differ by is added beside the layers, to its own samples alone (see ``bdm.plugins.low_rank``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drawing.request import PluginUse, Request
from ..errors import UserError
from ..plugins.low_rank import LowRank, hang_low_rank
from ..speed.rows import DistinctRows

#: An adapter's file: its hash and where it lies.
File = tuple[str, str]
#: By file, what the strengths in UNet and text encoder differ by from those in the weights.
Differences = Mapping[File, tuple[float, float]]
#: Larger strengths are drawn apart: of sums that nearly cancel, little would be left that is exact.
_MOST = 16.0


def without_adapters(plugins: Sequence[PluginUse]) -> tuple[PluginUse, ...]:
    """The plug-ins that drawings must have in common."""
    return tuple(plugin for plugin in plugins if plugin.kind != "adapter")


class BatchAdapters:
    """The adapters of a batch.

    Args:
        pipe: with the plug-ins of the first drawing in it.
        request: that drawing's.
        stack: takes off what is hung.
        rows: which rows of the UNet's batch stand for others.
    """

    def __init__(self, pipe: Any, request: Request, stack: ExitStack, rows: DistinctRows) -> None:
        self._pipe, self._stack, self._distinct = pipe, stack, rows
        self._merged = _strengths(request)
        self._known: dict[File, bool] = {}
        self._rows: dict[File, Tensor] = {}
        self._own = threading.local()

    def differences(self, request: Request) -> Differences | None:
        """What a drawing's strengths differ by; None where it cannot be drawn beside the others."""
        wanted = _strengths(request)
        found: dict[File, tuple[float, float]] = {}
        for file in {**self._merged, **wanted}:
            ours, theirs = wanted.get(file, (0.0, 0.0)), self._merged.get(file, (0.0, 0.0))
            difference = ours[0] - theirs[0], ours[1] - theirs[1]
            if difference == (0.0, 0.0):
                continue
            if not all(abs(one) <= _MOST for one in (*ours, *theirs)) or not self._hung(file):
                return None
            found[file] = difference
        return found

    @contextmanager
    def joined(self, each: Sequence[tuple[Differences, int]]) -> Iterator[None]:
        """Have the differences in force in a joined call of the UNet.

        Args:
            each: a drawing's differences and how many rows it has, in the order of the rows.
        """
        files = {file for differences, _ in each for file in differences}
        device = self._pipe.unet.device
        self._rows = {
            file: torch.tensor(
                [differences.get(file, (0.0, 0.0))[0] for differences, count in each for _ in range(count)],
                device=device,
            )
            for file in files
        }
        try:
            yield
        finally:
            self._rows = {}

    @contextmanager
    def in_texts(self, differences: Differences) -> Iterator[None]:
        """Have differences in force in the text encoder's calls of this thread, a drawing's own."""
        self._own.differences = differences
        try:
            yield
        finally:
            self._own.differences = {}

    def _hung(self, file: File) -> bool:
        """Whether an adapter can be added beside the layers; it is hung there when it is first met."""
        if file not in self._known:
            changes = _low_rank(self._pipe.plugins, file)
            self._known[file] = changes is not None
            for part, layers in (changes or {}).items():
                network = getattr(self._pipe, part)
                strength = partial(self._of_rows if part == "unet" else self._of_thread, file)
                for name, change in layers.items():
                    hang_low_rank(self._stack, network.get_submodule(name), change, strength)
        return self._known[file]

    def _of_rows(self, file: File, x: Tensor) -> Tensor | None:
        each = self._rows.get(file)
        if each is None or len(each) == len(x):
            return each
        rows = self._distinct.rows()
        assert rows is not None
        return rows.select(each)

    def _of_thread(self, file: File, x: Tensor) -> float | None:
        differences: Differences = getattr(self._own, "differences", {})
        return differences.get(file, (0.0, 0.0))[1] or None


def _strengths(request: Request) -> dict[File, tuple[float, float]]:
    """By file, the strengths of a complete request's adapters in UNet and text encoder."""
    found: dict[File, tuple[float, float]] = {}
    for plugin in request.plugins:
        if plugin.kind == "adapter":
            file = plugin.file.hash, str(plugin.file.source)
            unet, text = found.get(file, (0.0, 0.0))
            own = plugin.strength if plugin.text_strength is None else plugin.text_strength
            found[file] = unet + plugin.strength, text + own
    return found


def _low_rank(plugins: Any, file: File) -> dict[str, dict[str, LowRank]] | None:
    """What a file adds beside the layers; None where that is not all, or attaching it would be refused."""
    try:
        return plugins.low_rank(Path(file[1]))
    except (UserError, OSError):  # which whoever attaches it will say
        return None
