"""What a run may lose: faults are counted by kind, each kind has a limit, each fault is named in a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from ..files import append_line
from .reading import NotWhole
from .source import UnreadableExample

Opened = TypeVar("Opened")

#: Kinds of faults by what speaks against an example. What filters leave out is no fault.
FAULTS = {"unreadable": "sample", "caption": "sample", "read": "read", "shard": "shard"}
#: Kinds that are counted.
KINDS = ("sample", "read", "shard")
#: So many uses are looked at before a share counts.
AT_LEAST = 200


@dataclass
class Budget:
    """Faults of a process's examples, up to which a run goes on.

    Attributes:
        sample: share of the uses whose example may be damaged or without a caption.
        read: share of the uses whose bytes may be unreadable for the system or the store.
        shard: share of the shards that may be others than they were; one at least.
        shards: how many there are.
        log: file that names them, one JSON object a line.
        used: uses so far.
        counts: faults so far, by kind ("sample", "read", "shard").
        lost: the shards that were others.
    """

    sample: float = 0.05
    read: float = 0.05
    shard: float = 0.05
    shards: int = 1
    log: Path | None = None
    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)

    def spend(self, uses: int, faults: Sequence[UnreadableExample]) -> None:
        """Count uses and what could not be used among them.

        Raises:
            UserError: too much of one kind, or the log cannot be written.
        """
        self.used += uses
        for fault in faults:
            kind = FAULTS.get(fault.kind)
            if fault.key in self.lost:
                continue
            if kind == "shard":
                self.lost.add(fault.key)
            if self.log is not None:
                append_line(self.log, {"key": fault.key, "reason": fault.reason})
            if kind is not None:
                self.counts[kind] += 1
                self._check(kind, fault)

    def _check(self, kind: str, last: UnreadableExample) -> None:
        uses = max(self.used, AT_LEAST)
        name, limit, allowed, of = {
            "sample": ("unreadable_limit", self.sample, self.sample * uses, f"{self.used} examples"),
            "read": ("read_limit", self.read, self.read * uses, f"{self.used} examples"),
            "shard": ("data.shard_limit", self.shard, max(1.0, self.shard * self.shards), "the shards"),
        }[kind]
        if self.counts[kind] > allowed:
            raise UserError(
                f"{self.counts[kind]} of {of} cannot be used, the last {last.key}"
                f" ({last.reason}); allowed is a share of {limit:g} ({name}):"
                f" see {self.log or 'the data'}, mend it or its filters"
            )


def open_shards(
    openers: Iterable[Callable[[], Opened]],
    count: int,
    least: int,
    limit: float,
    log: Callable[[str], object],
) -> list[Opened]:
    """The shards that are whole. Those that are not are named and left out, one at least and a share at most.

    What the system or the store could not read ends the work: another process might read it, and then their
    orders would differ.

    Args:
        openers: a function a shard.
        count: how many there are.
        least: more than so many are needed.
        limit: share of the shards that may be left out.
        log: is told of each.

    Raises:
        UserError: too many are not whole, or too few are.
    """
    opened, bad = [], []
    for opener in openers:
        try:
            opened.append(opener())
        except NotWhole as error:
            bad.append(error)
            log(f"left out: {error}")
    if bad and (len(opened) <= least or len(bad) > max(1, limit * count)):
        raise UserError(
            f"{bad[0]} ({len(bad)} of {count} shards are not whole; allowed is a share of {limit:g},"
            f" data.shard_limit, and more than {least} have to be left)"
        )
    return opened
