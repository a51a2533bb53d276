"""Examples by their position in the stream, and who takes the place of one that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .source import Example, Source, UnreadableExample

#: So many examples are tried for a place, and so many of one shard.
TRIES, OF_ONE = 1000, 200
#: What may speak against all of a shard.
OF_SHARDS = ("read", "shard")


class Drawn(NamedTuple):
    """What a place in the stream got: an example, or none, and the faults on the way to it."""

    position: int
    chosen: int
    example: Example | None
    faults: tuple[UnreadableExample, ...] = ()


class Positions(Dataset):
    """Examples by (position, index).

    One that cannot be used gives way to another of its shard and bucket, or of the next shard, drawn by the
    position: so those near a damaged one are not used more than others, and who takes whose place is the same
    for every number of processes and after a resume.

    Args:
        source: the examples.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, key: tuple[int, int]) -> Drawn:
        position, first = key
        faults: list[UnreadableExample] = []
        later: list[Iterator[int]] = []
        for group in chain(self._groups(position, first), later):
            for index in islice(group, OF_ONE):
                try:
                    return Drawn(position, index, self.source[index], tuple(faults))
                except UnreadableExample as error:
                    faults.append(error)
                    if error.kind in OF_SHARDS:
                        # Other shards first; this one's are tried where those have none.
                        later.append(group)
                        break
            if len(faults) >= TRIES:
                break
        return Drawn(position, first, None, tuple(faults))

    def _groups(self, position: int, first: int) -> Iterator[Iterator[int]]:
        yield iter([first])
        for number, group in enumerate(neighbours(self.source, first)):
            own = number == 0
            yield (int(group[i]) for i in walk(len(group), position) if not own or group[i] != first)


def neighbours(source: Any, index: int) -> Iterator[np.ndarray]:
    """Examples that may stand for one: of its bucket, its own shard's and then each other shard's."""
    if hasattr(source, "neighbours"):
        yield from source.neighbours(index)
        return
    ends = np.cumsum(getattr(source, "shard_sizes", None) or [len(source)])
    kept, buckets = getattr(source, "kept", None), getattr(source, "bucket_of", None)
    own = int(np.searchsorted(ends, index, side="right"))
    for shard in (*range(own, len(ends)), *range(own)):
        members = np.arange(ends[shard - 1] if shard else 0, ends[shard])
        if kept is not None:
            members = members[kept[members]]
        if buckets is not None:
            members = members[buckets[members] == buckets[index]]
        yield members


def walk(count: int, seed: int) -> Iterator[int]:
    """The numbers below ``count``, each once, in steps of one length that begin where the seed says."""
    if not count:
        return
    start, step = (seed * 0x9E3779B1) % count, (seed * 0x85EBCA6B) % count or 1
    while gcd(step, count) > 1:
        step += 1
    for i in range(count):
        yield (start + i * step) % count
