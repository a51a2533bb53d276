"""Shards of a machine: fetched whole, once, ahead of time, by one of its processes; read there by all."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .local import LocalFolder
from .partitions import Partitions
from .reading import ReadError, copy_file, is_local, read_range

logger = logging.getLogger("bdm")

#: Shards that are fetched at the same time.
AT_ONCE = 4
#: Seconds after which a shard that could not be fetched is asked for again.
LOST = 600.0


@dataclass(frozen=True)
class Node:
    """The processes of one machine among those of a run.

    Attributes:
        first: number of its first process.
        count: how many it has.
        processes: of the run.
    """

    first: int = 0
    count: int = 1
    processes: int = 1

    @classmethod
    def of(cls, process: int, processes: int) -> Node:
        """The machine of a process, as launchers tell it (``LOCAL_WORLD_SIZE``)."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if count < 1 or processes % count:
            count = 1
        return cls(process // count * count, count, processes)

    def owned(self, partitions: int) -> list[int]:
        """The partitions from which its processes take most of their samples."""
        owners = ((np.arange(partitions) + 0.5) / partitions * self.processes).astype(int)
        return np.flatnonzero((owners >= self.first) & (owners < self.first + self.count)).tolist()


class Shards:
    """The files of a corpus as a machine reads them.

    A file of another machine's partitions, of this one's disk, or one that cannot be kept here, is read where
    it lies: a range a sample.

    Args:
        url_of: URL of a shard by its number.
        size_of: (S,) bytes of each.
        crc_of: (S,) CRC-32 of each, 0 where it is not known.
        folder: where they are kept; None for nowhere.
        owned: (S,) which are this machine's.
    """

    def __init__(
        self,
        url_of: Callable[[int], str],
        size_of: np.ndarray,
        crc_of: np.ndarray,
        folder: LocalFolder | None = None,
        owned: np.ndarray | None = None,
    ) -> None:
        self._url_of, self._sizes, self._crcs = url_of, size_of, crc_of
        self._folder, self.owned = folder, owned
        self._lost: dict[int, float] = {}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard.

        Raises:
            ReadError: they cannot be read.
        """
        kept = self.keep(shard)
        if kept is not None:
            try:
                with open(kept, "rb") as file:
                    content = os.pread(file.fileno(), size, offset)
                if len(content) == size:
                    return content
            except OSError:  # made room for another just now, or the disk is at fault
                pass
        return read_range(self._url_of(shard), offset, size, tries=shard not in self._lost)

    def keep(self, shard: int) -> Path | None:
        """The file on this machine, fetched if it is not there; None for one that is read where it lies."""
        url = self._url_of(shard)
        if self._folder is None or is_local(url) or (self.owned is not None and not self.owned[shard]):
            return None
        if time.monotonic() < self._lost.get(shard, 0.0):
            return None
        name = f"{url} {self._sizes[shard]} {self._crcs[shard]}"
        try:
            return self._folder.get(name, lambda path: self._fetch(shard, url, path))
        except ReadError as error:
            logger.warning("%s; its samples are read one by one", error)
            self._lost[shard] = time.monotonic() + LOST
            return None

    def _fetch(self, shard: int, url: str, path: Path) -> None:
        """Copy a shard that is what the index says, once more if it is not."""
        expected = int(self._crcs[shard])
        for _ in range(2):
            if copy_file(url, int(self._sizes[shard]), path) == expected or not expected:
                return
        raise ReadError(f"{url} is not what the index says (its checksum is another)")

    def bytes_of(self, shards: Iterable[int]) -> int:
        """How large shards are together."""
        return int(sum(self._sizes[shard] for shard in shards))


class Ahead:
    """Fetches the shards of this window of every partition, and of the next, while batches are used.

    Args:
        shards: as the machine reads them.
        partitions: of the corpus.
        owned: the partitions of this machine.
        windows_from: (number of a batch, partition) -> (pass, window).
    """

    def __init__(
        self,
        shards: Shards,
        partitions: Partitions,
        owned: list[int],
        windows_from: Callable[[int, int], tuple[int, int]],
    ) -> None:
        self._shards, self._partitions, self._owned = shards, partitions, owned
        self._windows_from = windows_from
        self._asked: dict[int, tuple[int, int]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bdm-fetch")

    def reach(self, number: int) -> None:
        """Batches up to this number are about to be used."""
        for partition in self._owned:
            now = self._windows_from(number, partition)
            if self._asked.get(partition) == now:
                continue
            self._asked[partition] = now
            for window in (now, self._after(partition, *now)):
                for shard in self.shards_of(partition, *window):
                    self._pool.submit(self._shards.keep, shard)

    def _after(self, partition: int, epoch: int, window: int) -> tuple[int, int]:
        last = window + 1 == self._partitions.windows(epoch, partition)
        return (epoch + 1, 0) if last else (epoch, window + 1)

    def shards_of(self, partition: int, epoch: int, window: int) -> list[int]:
        """Shards of a window of a partition."""
        pieces = self._partitions.pieces(epoch, partition, window)
        return self._partitions.segments.shard[pieces].tolist()

    def close(self) -> None:
        """No more is fetched; what is being fetched is left to itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_room(folder: LocalFolder, needed: int) -> None:
    """Say so where a folder cannot hold what is read at the same time: shards would be fetched again."""
    if needed > folder.limit:
        logger.warning(
            "%s may hold %.1f GB (data.local_gb), and the shards that are shuffled together have about %.1f"
            " GB: some are fetched more than once; raise it, or use smaller shards or more machines",
            folder.path,
            folder.limit / 1e9,
            needed / 1e9,
        )
