"""Which examples a process takes of each batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from .buckets import BucketOrder
from .order import draw_indices
from .source import Source

logger = logging.getLogger("bdm")

#: (number of a batch, process, processes) -> (position in the stream, index) of each of the process's
#: examples.
Share = Callable[[int, int, int], list[tuple[int, int]]]


def order_of(source: Source, size: int, seed: int) -> Share:
    """Who takes which examples of each batch of ``size``: all processes together take every one once.

    A source may have an order of its own (``source.order(size, seed)``).
    """
    own: Any = getattr(source, "order", None)
    if own is not None:
        return own(size, seed)
    draw = _draw(source, size, seed)

    def share(number: int, process: int, processes: int) -> list[tuple[int, int]]:
        count = size // processes
        begin = process * count
        positions = range(number * size + begin, number * size + begin + count)
        return list(zip(positions, draw(number)[begin : begin + count], strict=True))

    return share


class PlainOrder:
    """The order of a source without buckets (see ``draw_indices``), by position.

    Args:
        source: the examples.
        seed: of the run.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self._sizes, self._members, self._seed = *_kept_sizes(source), seed

    def where(self, positions: np.ndarray) -> np.ndarray:
        """In which part of the corpus an example lies: nobody knows, so they are shared out evenly."""
        return np.arange(len(positions)) / max(1, len(positions))

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Which examples positions have."""
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        drawn = [draw_indices(int(r[0]), len(r), self._sizes, self._seed) for r in runs if len(r)]
        found = np.array([index for own in drawn for index in own], dtype=np.int64)
        return found if self._members is None else self._members[found]


def _kept_sizes(source: Any) -> tuple[list[int], np.ndarray | None]:
    """Examples of each shard that have a place in the order, and which these are if not all."""
    sizes, kept = getattr(source, "shard_sizes", None) or [len(source)], getattr(source, "kept", None)
    if kept is None:
        return sizes, None
    # What the filters leave out has no place in the order.
    members = np.flatnonzero(kept)
    return np.diff(np.searchsorted(members, np.cumsum(sizes)), prepend=0).tolist(), members


def _draw(source: Source, size: int, seed: int) -> Callable[[int], list[int]]:
    """Number of a batch -> indices of its examples over all processes."""
    (sizes, members), buckets = _kept_sizes(source), getattr(source, "bucket_of", None)
    if members is None:
        return _draw_all(sizes, buckets, size, seed)
    draw = _draw_all(sizes, None if buckets is None else buckets[members], size, seed)
    return lambda number: members[draw(number)].tolist()


def _draw_all(
    sizes: list[int], buckets: np.ndarray | None, size: int, seed: int
) -> Callable[[int], list[int]]:
    if buckets is None:
        return lambda number: draw_indices(number * size, size, sizes, seed)
    order = BucketOrder(buckets, sizes, size, seed)
    if order.left_out > 0.01 * len(buckets):
        logger.warning(
            "%d of %d samples fill no batch of their bucket and are left out of a pass",
            order.left_out,
            len(buckets),
        )
    return order.indices
