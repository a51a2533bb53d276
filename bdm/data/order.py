"""In which order a run sees its examples: a pure function of its seed and of the position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

#: Shards whose samples are shuffled together. More mix better, fewer read with fewer jumps.
WINDOW = 16


def draw_indices(position: int, count: int, sizes: Sequence[int], seed: int) -> list[int]:
    """Indices of the ``count`` samples that start at ``position`` in an endless shuffled stream.

    Each pass over the examples has an order of its own, a pure function of ``(seed, pass)``: the shards are
    shuffled, and the samples of every ``WINDOW`` successive ones together. A run that stops after any number
    of samples therefore continues in the same order, whatever the number of processes, and no pass repeats or
    leaves out an example.

    Args:
        position: samples drawn before.
        count: how many are wanted.
        sizes: samples of each shard; a source without shards is one.
        seed: of the run.
    """
    sizes, total = tuple(sizes), sum(sizes)
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), total)
        ends = _window_ends(sizes, seed, epoch)
        window = bisect_right(ends, offset)
        start = ends[window - 1] if window else 0
        order = order_of_window(sizes, seed, epoch, window)
        indices += order[offset - start : offset - start + count - len(indices)].tolist()
    return indices


@lru_cache(maxsize=2)
def windows_of_pass(sizes: tuple[int, ...], seed: int, epoch: int) -> list[list[int]]:
    """The shards of each window of a pass."""
    shards = torch.randperm(len(sizes), generator=draw_generator(seed, epoch)).tolist()
    return [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]


@lru_cache(maxsize=2)
def _window_ends(sizes: tuple[int, ...], seed: int, epoch: int) -> list[int]:
    """How many samples lie before the end of each window."""
    return list(
        accumulate(sum(sizes[shard] for shard in window) for window in windows_of_pass(sizes, seed, epoch))
    )


@lru_cache(maxsize=4)
def order_of_window(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> Tensor:
    """The indices of a window's samples in the order of a pass."""
    starts = [0, *accumulate(sizes)]
    members = torch.cat(
        [torch.arange(starts[s], starts[s + 1]) for s in windows_of_pass(sizes, seed, epoch)[window]]
    )
    return members[torch.randperm(len(members), generator=draw_generator(seed, epoch, window + 1))]


def draw_generator(seed: int, epoch: int, part: int = 0) -> torch.Generator:
    """The generator of a pass (part 0) or of a part of it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch + (part << 40))
