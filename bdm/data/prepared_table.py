"""The samples of all prepared shards of a split in one mapped array, 24 bytes each, as ``prepare`` ends with.

``train.rows`` holds a ``ROW`` for each sample, shard by shard, and ``train.shards.npz`` the shards' names,
sizes and numbers of samples. Folders without them are read shard by shard.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .reading import file_system, is_local

#: A sample: place and size of its tensors in the tar, size of its JSON (which is the next member), score in
#: ten-thousandths, bucket, and whether an earlier picture has its hash.
ROW = np.dtype(
    [
        ("place", "<u8"),
        ("size", "<u4"),
        ("facts", "<u4"),
        ("score", "<i4"),
        ("bucket", "<i2"),
        ("later", "<i2"),
    ]
)
#: Score of a sample without one.
NO_SCORE = -(2**31)
#: Rows that are looked at together.
CHUNK = 2**22


def facts_place(place: Any, size: Any) -> Any:
    """Where the JSON behind a sample's tensors begins: they fill blocks of 512 bytes, its header one."""
    return -(-(place + size) // 512) * 512 + 512


@dataclass(frozen=True)
class PreparedTable:
    """The samples of a split.

    Attributes:
        names: of the S shards.
        sizes: (S,) bytes of each.
        ends: (S,) rows up to the end of each.
        rows: (N,) of ``ROW``, mapped where they lie on this machine.
    """

    names: list[str]
    sizes: np.ndarray
    ends: np.ndarray
    rows: np.ndarray

    def kept(self, min_score: float | None, duplicates: bool) -> np.ndarray | None:
        """(N,) whether a sample passes; None where there is nothing to ask."""
        if min_score is None and duplicates:
            return None
        kept = np.ones(len(self.rows), dtype=bool)
        for start in range(0, len(kept), CHUNK):
            own, part = self.rows[start : start + CHUNK], kept[start : start + CHUNK]
            if not duplicates:
                part &= own["later"] == 0
            if min_score is not None:
                part &= (own["score"] != NO_SCORE) & (own["score"] / 10_000 >= min_score)
        return kept

    def shard(self, number: int) -> np.ndarray:
        """The rows of a shard."""
        start = int(self.ends[number - 1]) if number else 0
        return self.rows[start : int(self.ends[number])]


def read_table(folder: str, split: str) -> PreparedTable | None:
    """The table of a split, or None where there is no whole one."""
    filesystem, path = file_system(folder)
    try:
        with np.load(
            io.BytesIO(filesystem.cat_file(f"{path}/{split}.shards.npz")), allow_pickle=False
        ) as about:
            names, sizes, counts = about["names"].tolist(), about["sizes"], about["counts"]
        if is_local(folder):
            where = Path(path) / f"{split}.rows"
            rows = np.memmap(where, ROW, "r") if counts.sum() else np.zeros(0, ROW)
        else:
            rows = np.frombuffer(filesystem.cat_file(f"{path}/{split}.rows"), ROW)
    except Exception:  # of any store or of half a file; the shards say it too
        return None
    ends = np.cumsum(counts)
    return PreparedTable(names, sizes, ends, rows) if len(rows) == counts.sum() else None


def check_sizes(folder: str, table: PreparedTable, found: dict[str, Any]) -> None:
    """See that the shards are those of the table.

    Args:
        folder: of the shards.
        table: of a split.
        found: what the file system says of each file, by name.

    Raises:
        UserError: one is another.
    """
    for name, size in zip(table.names, table.sizes.tolist(), strict=True):
        seen = found[name].get("size") if name in found else 0
        if seen is not None and seen != size:
            raise UserError(
                f"shard {folder}/{name} has {seen} bytes, its table says {size}; delete it and run bdm"
                " prepare again"
            )
