"""Prepared shards in partitions: a batch takes its share of each, and a machine reads those of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .bucket_partitions import BucketPartitionOrder
from .local import LocalFolder
from .node import Ahead, Node, Shards, check_room
from .partitions import WINDOW, PartitionOrder, Partitions
from .prepared import PreparedSource
from .shares import Share


class PartitionedPrepared:
    """A prepared source whose order is that of an indexed corpus (see ``bdm.data.partitions``).

    What is not asked of it is the source's own.

    Args:
        source: the prepared shards.
        partitions: into how many parts they are split.
        local: folder on this machine's disk in which shards of a store are kept; None reads each sample
            where it lies.
        local_gb: gigabytes of that folder at most.
        owned: (S,) which shards are this machine's; all if None.
    """

    def __init__(
        self,
        source: PreparedSource,
        partitions: int,
        local: Path | None = None,
        local_gb: float = 50.0,
        owned: np.ndarray | None = None,
    ) -> None:
        self._source, self._count = source, partitions
        self._settings = local, local_gb
        self._folder = None if local is None else LocalFolder(Path(local), int(local_gb * 1e9))
        unknown = np.zeros(len(source.shard_sizes), dtype=np.int64)
        self._shards = Shards(source.url_of, source.shard_bytes, unknown, self._folder, owned)
        source.read_bytes = self._shards.read

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A new process opens its own files."""
        return type(self), (self._source, self._count, *self._settings, self._shards.owned)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def caption(self, index: int) -> str:
        """See ``Source``."""
        return self._source.caption(index)

    @property
    def validation(self) -> PreparedSource:
        """See ``Source``."""
        return self._source.validation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while a data worker unpickles it
            raise AttributeError(name)
        return getattr(self._source, name)

    def partitions(self, seed: int) -> Partitions:
        """The corpus in its partitions."""
        return Partitions(np.asarray(self._source.shard_sizes), seed, self._count)

    def make_order(self, size: int, seed: int) -> PartitionOrder | BucketPartitionOrder:
        """The order of batches of ``size``."""
        partitions, buckets = self.partitions(seed), self._source.bucket_of
        if buckets is None:
            return PartitionOrder(partitions, size)
        return BucketPartitionOrder(partitions, buckets, _per_shard(self._source, buckets), size)

    def order(self, size: int, seed: int) -> Share:
        """Who takes which examples of a batch (see ``bdm.data.shares``)."""
        return self.make_order(size, seed).share

    def on_node(self, node: Node, seed: int) -> PartitionedPrepared:
        """The same samples, read as a machine does that keeps the shards of its own partitions."""
        segments = self.partitions(seed).segments
        owned = np.zeros(len(self._source.shard_sizes), dtype=bool)
        for p in node.owned(self._count):
            owned[segments.shard[slice(*segments.cuts[p : p + 2])]] = True
        return PartitionedPrepared(self._source.again(), self._count, *self._settings, owned)

    def ahead(self, node: Node, size: int, seed: int) -> Ahead | None:
        """What fetches a machine's shards ahead of time; None where none are kept."""
        if self._folder is None:
            return None
        order, owned = self.make_order(size, seed), node.owned(self._count)
        mean = float(np.mean(self._source.shard_bytes))
        check_room(self._folder, int(2 * WINDOW * len(owned) * mean))
        return Ahead(self._shards, order.partitions, owned, order.windows_from)


def _per_shard(source: PreparedSource, buckets: np.ndarray) -> np.ndarray:
    """(S, K) samples of each bucket in each shard."""
    count = len(source.manifest["buckets"])
    ends = np.cumsum(source.shard_sizes)
    starts = ends - np.asarray(source.shard_sizes)
    return np.stack([np.bincount(buckets[a:b], minlength=count) for a, b in zip(starts, ends, strict=True)])
