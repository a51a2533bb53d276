"""The end of preparing, shard by shard: a table of each split, its near-duplicates, what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ..data.prepared_table import NO_SCORE, ROW, facts_place
from ..files import atomic_write, to_json
from .writer import read_table

#: Hashes that are sorted together.
TOGETHER = 2**25


@dataclass
class Totals:
    """What all shards have together.

    Attributes:
        left_out: samples by reason.
        scores: how often each score was seen (they have four decimals).
        kept: samples that were written.
        size: bytes.
        shards: how many there are.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    scores: Counter[float] = field(default_factory=Counter)
    kept: int = 0
    size: int = 0
    shards: int = 0

    def add(self, table: dict[str, Any]) -> None:
        """Count a shard in."""
        self.left_out.update(table["left_out"])
        self.scores.update(table["seen_scores"])
        self.kept += len(table["places"])
        self.size += table["size"]
        self.shards += 1


def join_tables(out: Path, paths: list[Path], totals: Totals) -> dict[str, list[int]]:
    """Write the table of each split and mark its near-duplicates; what was of no use goes to a list.

    Args:
        out: folder of the shards.
        paths: of all shards.
        totals: are counted up.

    Returns:
        By shard, the rows whose hash occurred before in its split.
    """
    rows: dict[str, list[int]] = {}
    with open(out / "unusable.jsonl", "wb") as unusable:
        for split in sorted({path.name.rpartition("-")[0] for path in paths}):
            own = [path for path in paths if path.name.rpartition("-")[0] == split]
            rows |= _join_split(out, split, own, totals, unusable)
    return rows


def _join_split(
    out: Path, split: str, paths: list[Path], totals: Totals, unusable: Any
) -> dict[str, list[int]]:
    hashes, counts, sizes = [], [], []
    with ExitStack() as stack:
        partial = stack.enter_context(atomic_write(out / f"{split}.rows"))
        with open(partial, "wb") as file:
            for path in paths:
                table = read_table(path)
                assert table is not None, path
                totals.add(table)
                for key, reason in table["unusable"]:
                    unusable.write(to_json({"key": key, "reason": reason}) + b"\n")
                file.write(rows_of(table).tobytes())
                hashes.append(np.array(table["hashes"], dtype=np.uint64))
                counts.append(len(table["places"]))
                sizes.append(table["size"])
        later = mark_later(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        if len(later):
            np.memmap(partial, ROW, "r+")["later"] = later
    with atomic_write(out / f"{split}.shards.npz") as partial, open(partial, "wb") as file:
        np.savez(file, names=np.array([p.name for p in paths]), sizes=sizes, counts=counts)  # pyright: ignore
    parts = np.split(later, np.cumsum(counts)[:-1])
    pairs = zip(paths, parts, strict=True)
    return {path.name: np.flatnonzero(own).tolist() for path, own in pairs if own.any()}


def rows_of(table: dict[str, Any]) -> np.ndarray:
    """A shard's samples as rows."""
    places = np.array(table["places"], dtype=np.int64).reshape(-1, 4)
    rows = np.zeros(len(places), dtype=ROW)
    rows["place"], rows["size"], rows["facts"] = places[:, 0], places[:, 1], places[:, 3]
    assert (facts_place(places[:, 0], places[:, 1]) == places[:, 2]).all(), "JSON is the next member"
    rows["score"] = [_score(score) for score in table["scores"]]
    rows["bucket"] = table["buckets"]
    return rows


def _score(score: float | None) -> int:
    return NO_SCORE if score is None or not isfinite(score) else round(score * 10_000)


def mark_later(hashes: np.ndarray) -> np.ndarray:
    """(N,) whether an equal hash comes before, for (N,) uint64; sorted part by part of their values."""
    later = np.zeros(len(hashes), dtype=bool)
    for chosen in _parts(hashes):
        own = hashes[chosen]
        first = np.zeros(len(own), dtype=bool)
        first[np.unique(own, return_index=True)[1]] = True
        later[chosen[~first]] = True
    return later


def _parts(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Places of hashes that may be equal, few enough to be sorted."""
    count = np.uint64(len(hashes) // TOGETHER + 1)
    for number in range(int(count)):
        yield np.flatnonzero(hashes % count == number)


def write_duplicates(path: Path, rows: dict[str, list[int]]) -> None:
    """Write by shard the rows that are near-duplicates.

    It is the last file: sources take a folder without it for unfinished.
    """
    compared = (
        "64-bit DCT hashes of the cut pictures; equal ones are near-duplicates, the first is not listed"
    )
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"compared": compared, "rows": rows}) + "\n", encoding="utf-8")
