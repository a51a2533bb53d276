"""The distinct rows of a batch: modules run on them alone, and their results are repeated for the others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..method.hooks import hang_after, hang_before


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch stand for all.

    Attributes:
        batch: rows of the whole batch.
        chosen: indices of the rows that are computed.
        back: for every row, the position of its equal among the chosen.
    """

    batch: int
    chosen: Tensor
    back: Tensor

    @classmethod
    def of(cls, chosen: Sequence[int], back: Sequence[int], device: Any) -> Rows:
        """Rows by their indices."""
        return cls(len(back), torch.tensor(chosen, device=device), torch.tensor(back, device=device))

    @classmethod
    def standing_for(cls, rows: Sequence[int], device: Any) -> Rows | None:
        """Rows by which one stands for each, itself or one before it; None where all stand for themselves."""
        chosen = sorted(set(rows))
        if len(chosen) == len(rows):
            return None
        place = {row: n for n, row in enumerate(chosen)}
        return cls.of(chosen, [place[row] for row in rows], device)

    @classmethod
    def part(cls, batch: int, index: int, parts: int, device: Any) -> Rows:
        """One of the equal parts of a batch for all of them."""
        count = batch // parts
        return cls.of(range(index * count, (index + 1) * count), [*range(count)] * parts, device)

    def select(self, value: Tensor) -> Tensor:
        """The chosen rows of something that has the batch first; anything else as it is."""
        if not value.ndim or value.shape[0] != self.batch:
            return value
        return value.index_select(0, self.chosen)

    def spread(self, value: Tensor) -> Tensor:
        """Every row's result, from those of the chosen rows."""
        if not value.ndim or value.shape[0] != len(self.chosen):
            return value
        return value.index_select(0, self.back)


class DistinctRows:
    """Runs modules on the distinct rows of their inputs and repeats their outputs, while rows are set.

    They are set for the calls of one thread: a module may be at work in another one meanwhile.
    """

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._thread = 0
        self._texts: list[tuple[Tensor, Tensor]] = []

    def hang(self, stack: ExitStack, modules: Sequence[nn.Module]) -> None:
        """Hook the modules until ``stack`` closes."""
        for module in modules:
            hang_before(stack, module, self._select)
            hang_after(stack, module, self._spread)

    def set(self, rows: Rows | None, text: tuple[Tensor, Tensor] | None = None) -> None:
        """Choose the rows of the next calls.

        Args:
            rows: the distinct ones; None where all are.
            text: text features and their chosen rows, the same tensors in all steps so that what is kept for
                them stays valid.
        """
        self._rows, self._thread = rows, threading.get_ident()
        self._texts = [text] if text is not None else []

    def rows(self) -> Rows | None:
        """What is set for this thread."""
        return self._rows if self._thread == threading.get_ident() else None

    def _select(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        rows = self.rows()
        if rows is None:
            return None
        chosen = {name: self._chosen(rows, value) for name, value in kwargs.items()}
        return tuple(self._chosen(rows, value) for value in args), chosen

    def _chosen(self, rows: Rows, value: Any) -> Any:
        if not isinstance(value, Tensor):  # the known arguments hold no tensors within others
            return value
        for whole, selected in self._texts:
            if value is whole:
                return selected
        return rows.select(value)

    def _spread(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        rows = self.rows()
        return None if rows is None else pytree.tree_map_only(Tensor, rows.spread, output)
