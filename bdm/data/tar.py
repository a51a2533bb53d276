"""Tar shards as img2dataset and webdataset write them.

Pictures with ``.json`` or ``.txt`` beside them, read by index.

webdataset streams shards and cannot say where it stopped. Here every shard gets an index of its members'
places once, so any sample can be read alone, the order of a run is a function of its seed, and a run
continues at any sample.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write
from .captions import read_facts
from .members import group_members, score_rows
from .reading import NotWhole, ReadError, locate, read_range, retried, stamp
from .source import UnreadableExample

#: Of bytes that are read together so many may be of no use, beside as many as are.
SLACK = 65536


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie.

    Attributes:
        url: of the shard.
        keys: names of its N samples.
        places: (N, 6) int64: offset and size of picture, JSON and text; size 0 where there is none.
        sizes: (N, 2) width and height of the pictures, or None if they were not measured.
        scores: (N,) values of each field that was asked for, NaN where there is none.
    """

    url: str
    keys: list[str]
    places: np.ndarray
    sizes: np.ndarray | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


class TarShard:
    """The samples of a tar file.

    Args:
        url: of the file.
        cache: folder of its index.
        measured: whether the sizes of the pictures are wanted; they are read from their headers once, because
            the sizes in img2dataset's JSON can be those before it cropped.
        scores: fields whose values are wanted.
    """

    def __init__(
        self, url: str, cache: Path | None = None, measured: bool = False, scores: tuple[str, ...] = ()
    ) -> None:
        self.index = index_shard(url, cache, measured, scores)
        self.sizes, self.scores = self.index.sizes, self.index.scores
        self._last: tuple[int, int, bytes] = (-1, 0, b"")

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """Shard and key of a sample."""
        return f"{self.index.url}:{self.index.keys[row]}"

    def facts(self, row: int) -> Mapping[str, Any]:
        """The JSON of a sample, and its text file as ``"txt"``."""
        facts, wrong = read_facts(self._bytes(row, 2), self._bytes(row, 4))
        if wrong and not facts:
            raise UnreadableExample(self.key(row), wrong)
        return facts

    def picture(self, row: int) -> bytes:
        """The picture file of a sample."""
        return self._bytes(row, 0)

    def _bytes(self, row: int, column: int) -> bytes:
        offset, size = (int(n) for n in self.index.places[row, column : column + 2])
        try:
            start, content = self._together(row)
            return content[offset - start :][:size] if content else read_range(self.index.url, offset, size)
        except ReadError as error:
            raise UnreadableExample(self.key(row), str(error), "read") from None

    def _together(self, row: int) -> tuple[int, bytes]:
        """Where a sample's members begin and all their bytes, read at once; none where they lie apart."""
        if self._last[0] != row:
            places = self.index.places[row].reshape(3, 2)
            used = places[places[:, 1] > 0]
            start, end = int(used[:, 0].min()), int(used.sum(1).max())
            near = end - start <= 2 * int(used[:, 1].sum()) + SLACK
            content = read_range(self.index.url, start, end - start) if near else b""
            self._last = row, start, content
        return self._last[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": (-1, 0, b"")}


def index_shard(
    url: str, cache: Path | None = None, measured: bool = False, scores: tuple[str, ...] = ()
) -> ShardIndex:
    """The index of a shard; read from ``cache`` if it was made for the same file, else made and kept there.

    Raises:
        UserError: the shard cannot be read; ``NotWhole`` where it is no whole tar file.
    """
    filesystem, path, about = locate(url)
    scan = partial(scan_tar, filesystem, path, url, about, measured, scores)
    content = keep_arrays(cache, [*stamp(url, about), measured, *scores, "keys once"], scan)
    return ShardIndex(
        url,
        [str(k) for k in content["keys"]],
        content["places"],
        content["sizes"] if measured else None,
        dict(zip(scores, content["scores"].T, strict=True)) if scores else {},
    )


def keep_arrays(
    cache: Path | None, name: list[Any], make: Callable[[], dict[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Arrays that are made once and kept in a folder under the hash of ``name``."""
    if cache is None:
        return make()
    kept = cache / f"{hashlib.sha256(json.dumps(name).encode()).hexdigest()[:24]}.npz"
    if (content := _read_arrays(kept)) is not None:
        return content
    arrays = make()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, shared=True) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return arrays


def _read_arrays(kept: Path) -> Mapping[str, np.ndarray] | None:
    try:
        with np.load(kept, allow_pickle=False) as content:
            return dict(content)
    except FileNotFoundError:
        return None
    except Exception:  # half a file, from a machine that went down; it is made again
        return None


def scan_tar(
    filesystem: Any,
    path: str,
    url: str,
    about: Mapping[str, Any],
    measured: bool = False,
    scores: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Keys, places, sizes and scores of the samples in a tar file.

    Raises:
        UserError: it cannot be read; ``NotWhole`` where it is no whole tar file.
    """
    try:
        return retried(lambda: _scan(filesystem, path, url, about, measured, scores), url)
    except ReadError as error:
        raise UserError(f"shard {error}; start again when it can be") from None


def _scan(
    filesystem: Any, path: str, url: str, about: Mapping[str, Any], measured: bool, scores: tuple[str, ...]
) -> dict[str, np.ndarray]:
    try:
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            rows, end, again = group_members(archive, measured, bool(scores))
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise NotWhole(f"shard {url} is not a whole tar file ({error}); write or download it again") from None
    # A tar file ends with a block of zeros behind the last member, which fills its last block of 512 bytes.
    if about.get("size") is not None and about["size"] < -(-end // 512) * 512 + 512:
        raise NotWhole(
            f"shard {url} is not a whole tar file (its end is cut off); write or download it again"
        )
    return {
        "keys": np.array(list(rows), dtype=str),
        "places": np.array([row.members for row in rows.values()], dtype=np.int64).reshape(-1, 6),
        "sizes": np.array([row.size for row in rows.values()], dtype=np.int64).reshape(-1, 2),
        "scores": score_rows(rows, scores),
        "again": np.array(again),
    }
