"""The order of a large corpus: a pure function of seed and position in which every shard belongs to a part.

The shards are laid end to end, in an order that the seed decides once, and cut into a fixed number of
partitions of equally many samples. Position i of a pass is of partition i modulo their number, so every
batch takes its share of each; in a pass each partition goes through its shards in an order of that pass, and
shuffles those of ``WINDOW`` successive ones together. A batch is shared out partition by partition: a
process reads from few of them, always the same, and the batch is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

#: Shards of a partition that are shuffled together; over all partitions that is many, and a node keeps those
#: of its own ones.
WINDOW = 4


def own_generator(*place: int) -> torch.Generator:
    """A generator for a place in the order, such as (seed, pass, partition, window)."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)


def shuffled(count: int, *place: int) -> np.ndarray:
    """The numbers below ``count`` in the order of a place."""
    return torch.randperm(count, generator=own_generator(*place)).numpy()


@dataclass(frozen=True)
class Segments:
    """Pieces of shards, in the order in which they are laid end to end.

    Attributes:
        shard: number of each one's shard.
        first: number of its first sample in the whole corpus.
        count: samples.
        cuts: (P + 1,) where each partition's pieces begin.
    """

    shard: np.ndarray
    first: np.ndarray
    count: np.ndarray
    cuts: np.ndarray


def cut_segments(sizes: np.ndarray, seed: int, partitions: int) -> Segments:
    """Lay shards end to end and cut them into partitions of equally many samples (but for one).

    Args:
        sizes: (S,) samples of each shard.
        seed: decides the order in which they lie.
        partitions: how many.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = shuffled(len(sizes), seed, -1)
    laid = np.concatenate([[0], np.cumsum(sizes[order])])
    total = int(laid[-1])
    bounds = np.cumsum([0] + [total // partitions + (p < total % partitions) for p in range(partitions)])
    edges = np.unique(np.concatenate([laid, bounds]))
    begin = edges[:-1]
    place = np.searchsorted(laid, begin, side="right") - 1
    first = starts[order[place]] + begin - laid[place]
    return Segments(order[place], first, np.diff(edges), np.searchsorted(begin, bounds))


class Partitions:
    """The samples of a corpus by pass, partition and rank.

    Args:
        sizes: (S,) samples of each shard.
        seed: of the run.
        partitions: at most so many; never more than shards or samples.
    """

    def __init__(self, sizes: np.ndarray, seed: int, partitions: int) -> None:
        self.sizes, self.seed, self.total = sizes, seed, int(sizes.sum())
        self.count = max(1, min(partitions, int((sizes > 0).sum())))
        self.segments = cut_segments(np.asarray(sizes, dtype=np.int64), seed, self.count)
        self._order = lru_cache(maxsize=4 * self.count)(self._lay_out)
        self.window_samples = lru_cache(maxsize=2 * self.count + 2)(self._shuffle)

    def _lay_out(self, epoch: int, partition: int) -> tuple[np.ndarray, list[int]]:
        """A partition's pieces in the order of a pass, and the samples before each of its windows."""
        first, last = self.segments.cuts[partition : partition + 2]
        pieces = first + shuffled(int(last - first), self.seed, epoch, partition)
        per_window = np.add.reduceat(self.segments.count[pieces], np.arange(0, len(pieces), WINDOW))
        return pieces, [0, *np.cumsum(per_window).tolist()]

    def pieces(self, epoch: int, partition: int, window: int) -> np.ndarray:
        """Numbers of the pieces of a window."""
        return self._order(epoch, partition)[0][window * WINDOW : (window + 1) * WINDOW]

    def windows(self, epoch: int, partition: int) -> int:
        """How many windows a partition has."""
        return len(self._order(epoch, partition)[1]) - 1

    def window_at(self, epoch: int, partition: int, rank: int) -> int:
        """The window of a partition's sample number ``rank`` in a pass."""
        return bisect_right(self._order(epoch, partition)[1], rank) - 1

    def _shuffle(self, epoch: int, partition: int, window: int) -> np.ndarray:
        """The samples of a window in the order of a pass."""
        own = self.pieces(epoch, partition, window)
        first, count = self.segments.first[own], self.segments.count[own]
        members = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
        return members[shuffled(len(members), self.seed, epoch, partition, window)]

    def samples(self, epoch: int, partition: int, first: int, last: int) -> np.ndarray:
        """Indices of a partition's samples from rank ``first`` to before ``last`` in a pass."""
        before = self._order(epoch, partition)[1]
        found = []
        while first < last:
            window = bisect_right(before, first) - 1
            skip = first - before[window]
            found.append(self.window_samples(epoch, partition, window)[skip : skip + last - first])
            first += len(found[-1])
        return found[0] if len(found) == 1 else np.concatenate(found)


class PartitionOrder:
    """An endless stream of batches in which every sample comes once a pass.

    Args:
        partitions: of the corpus.
        size: samples of a batch over all processes.
    """

    def __init__(self, partitions: Partitions, size: int) -> None:
        self.partitions, self.size = partitions, size

    def share(self, number: int, process: int, processes: int) -> list[tuple[int, int]]:
        """The (position, index) pairs of a process's share of a batch."""
        positions = np.arange(number * self.size, (number + 1) * self.size)
        chosen = positions[own_share(self.where(positions), process, processes)]
        return list(zip(chosen.tolist(), self.indices(chosen).tolist(), strict=True))

    def where(self, positions: np.ndarray) -> np.ndarray:
        """In which part of the corpus a sample of a position lies, from 0 to below 1."""
        return positions % self.partitions.total % self.partitions.count / self.partitions.count

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Which samples positions have."""
        total, count = self.partitions.total, self.partitions.count
        epochs, places = np.divmod(positions, total)
        keys, ranks = epochs * count + places % count, places // count
        order = np.argsort(keys, kind="stable")
        keys, ranks = keys[order], ranks[order]
        # Of consecutive positions those of one partition have consecutive ranks.
        starts = np.flatnonzero(np.r_[True, (np.diff(keys) != 0) | (np.diff(ranks) != 1)])
        ends = np.r_[starts[1:], len(keys)]
        found = np.empty(len(positions), dtype=np.int64)
        for start, end, key, rank in zip(
            starts.tolist(), ends.tolist(), keys[starts].tolist(), ranks[starts].tolist(), strict=True
        ):
            samples = self.partitions.samples(key // count, key % count, rank, rank + end - start)
            found[order[start:end]] = samples
        return found

    def windows_from(self, number: int, partition: int) -> tuple[int, int]:
        """Pass and window of a partition at the beginning of a batch."""
        epoch, place = divmod(number * self.size, self.partitions.total)
        rank = -(-(place - partition) // self.partitions.count)
        if rank >= self._length(partition):
            return epoch + 1, 0
        return epoch, self.partitions.window_at(epoch, partition, rank)

    def _length(self, partition: int) -> int:
        total, count = self.partitions.total, self.partitions.count
        return total // count + (partition < total % count)


def own_share(where: np.ndarray, process: int, processes: int) -> np.ndarray:
    """Places in a batch that a process takes: a contiguous share of it, part by part of the corpus."""
    share = len(where) // processes
    return np.argsort(where, kind="stable")[process * share : (process + 1) * share]
