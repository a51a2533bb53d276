"""Batches of one bucket out of partitions (see ``bdm.data.partitions``): the same promises, bucket by bucket.

A bucket's samples are taken from all partitions in proportion to what each has of it, so that partitions
advance together; those that do not fill a bucket's last batch are left out of a pass, others in each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import UserError
from .partitions import Partitions, own_share, shuffled


class BucketPartitionOrder:
    """An endless stream of batches, each of one bucket, in which no sample comes twice in a pass.

    Args:
        partitions: of the corpus.
        bucket_of: (N,) number of each sample's bucket.
        counts: (S, K) samples of each bucket in each shard.
        size: samples of a batch over all processes.

    Raises:
        UserError: no bucket has enough samples for a batch.
    """

    def __init__(self, partitions: Partitions, bucket_of: np.ndarray, counts: np.ndarray, size: int) -> None:
        self.partitions, self.bucket_of, self.size = partitions, bucket_of, size
        self._per_piece = _count_pieces(partitions, bucket_of, counts)
        cuts = partitions.segments.cuts
        #: (P, K) samples of each bucket in each partition.
        self.counts = np.stack([self._per_piece[a:b].sum(0) for a, b in zip(cuts, cuts[1:], strict=False)])
        totals = self.counts.sum(0)
        #: Samples that a pass leaves out.
        self.left_out = int((totals % size).sum())
        self._schedule = _schedule(totals // size)
        #: Batches of a pass, the same in each.
        self.per_pass = len(self._schedule)
        if not self.per_pass:
            raise UserError(
                f"no bucket has {size} samples, one batch (the fullest has {totals.max()}); use a smaller"
                " batch_size, a larger buckets.step, or more data"
            )
        # Batches that are shuffled together, so that buckets follow each other at random: about a window's.
        self._together = max(1, self.per_pass // partitions.windows(0, 0))
        self._taken = lru_cache(maxsize=64)(lambda b, m: taken_of(self.counts[:, b], m * size))
        self._before = lru_cache(maxsize=4 * partitions.count)(self._count_windows)
        self._members = lru_cache(maxsize=2 * partitions.count + 2)(self._group)
        self._block = lru_cache(maxsize=4)(self._shuffle)

    def share(self, number: int, process: int, processes: int) -> list[tuple[int, int]]:
        """The (position, index) pairs of a process's share of a batch."""
        epoch, bucket, taken = self._batch(number)
        where = np.repeat(np.arange(self.partitions.count), taken[1] - taken[0])
        chosen = own_share(where, process, processes)
        rank = np.concatenate([np.arange(a, b) for a, b in taken.T])
        indices = [
            self._samples(epoch, partition, bucket, rank[chosen[where[chosen] == partition]])
            for partition in np.unique(where[chosen]).tolist()
        ]
        positions = number * self.size + chosen
        return list(zip(positions.tolist(), np.concatenate(indices).tolist(), strict=True))

    def windows_from(self, number: int, partition: int) -> tuple[int, int]:
        """Pass and window of a partition at the beginning of a batch."""
        epoch, place = divmod(number, self.per_pass)
        windows = self.partitions.windows(epoch, partition)
        return epoch, min(place * windows // self.per_pass, windows - 1)

    def _batch(self, number: int) -> tuple[int, int, np.ndarray]:
        """Pass and bucket of a batch, and (2, P) the ranks that it takes of each partition's bucket."""
        epoch, place = divmod(number, self.per_pass)
        block, inside = divmod(place, self._together)
        chosen = block * self._together + int(self._block(epoch, block)[inside])
        bucket, which = self._schedule[chosen].tolist()
        return epoch, bucket, np.stack([self._taken(bucket, which), self._taken(bucket, which + 1)])

    def _shuffle(self, epoch: int, block: int) -> np.ndarray:
        count = min(self._together, self.per_pass - block * self._together)
        return shuffled(count, self.partitions.seed, epoch, -2, block)

    def _count_windows(self, epoch: int, partition: int) -> np.ndarray:
        """(W + 1, K) samples of each bucket before each window."""
        windows = range(self.partitions.windows(epoch, partition))
        own = [self._per_piece[self.partitions.pieces(epoch, partition, w)].sum(0) for w in windows]
        return np.concatenate([np.zeros_like(self.counts[:1]), np.cumsum(own, axis=0)])

    def _group(self, epoch: int, partition: int, window: int) -> list[np.ndarray]:
        """A window's samples in their order, by bucket."""
        order = self.partitions.window_samples(epoch, partition, window)
        own = self.bucket_of[order]
        return [order[own == bucket] for bucket in range(self.counts.shape[1])]

    def _samples(self, epoch: int, partition: int, bucket: int, ranks: np.ndarray) -> np.ndarray:
        before = self._before(epoch, partition)[:, bucket]
        windows = np.searchsorted(before, ranks, side="right") - 1
        found = np.empty(len(ranks), dtype=np.int64)
        for window in np.unique(windows).tolist():
            own = windows == window
            found[own] = self._members(epoch, partition, window)[bucket][ranks[own] - before[window]]
        return found


def taken_of(counts: np.ndarray, first: int) -> np.ndarray:
    """How many of the first so many samples are each partition's, if all are used up evenly.

    Sample number r of a partition of c stands at (r + 0.5) / c; those of all partitions follow each other.

    Args:
        counts: (P,) samples of each partition.
        first: how many samples.
    """
    total = int(counts.sum())
    slack = len(counts) + 1
    # Surely among the first, and surely not: only what lies between is sorted.
    low = np.clip(np.ceil((first - slack) / total * counts - 0.5).astype(np.int64) - 1, 0, counts)
    high = np.clip(np.ceil((first + slack) / total * counts - 0.5).astype(np.int64) + 1, 0, counts)
    partition = np.repeat(np.arange(len(counts)), high - low)
    rank = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    order = np.lexsort((partition, (rank + 0.5) / counts[partition]))
    chosen = partition[order[: first - int(low.sum())]]
    return low + np.bincount(chosen, minlength=len(counts))


def _schedule(batches: np.ndarray) -> np.ndarray:
    """(M, 2) bucket and number in it of all batches of a pass, each bucket's evenly spread."""
    bucket = np.repeat(np.arange(len(batches)), batches)
    which = np.concatenate([np.arange(count) for count in batches])
    order = np.lexsort((bucket, (which + 0.5) / batches[bucket])) if len(bucket) else bucket
    return np.stack([bucket, which], axis=1)[order]


def _count_pieces(partitions: Partitions, bucket_of: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(pieces, K) samples of each bucket; only shards that are cut are looked into."""
    segments = partitions.segments
    per_piece = counts[segments.shard].astype(np.int64)
    for piece in np.flatnonzero(segments.count != partitions.sizes[segments.shard]).tolist():
        first, count = int(segments.first[piece]), int(segments.count[piece])
        own = np.asarray(bucket_of[first : first + count])
        per_piece[piece] = np.bincount(own, minlength=counts.shape[1])
    return per_piece
