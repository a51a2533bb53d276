"""Tar shards as img2dataset and webdataset write them.

Pictures with ``.json`` or ``.txt`` beside them, read by index.

webdataset streams shards and cannot say where it stopped. Here every shard gets an index of its members'
places once, so any sample can be read alone, the order of a run is a function of its seed, and a run
continues at any sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write
from .pictures import picture_size
from .source import UnreadableExample

PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie.

    Attributes:
        url: of the shard.
        keys: names of its N samples.
        places: (N, 6) int64: offset and size of picture, JSON and text; size 0 where there is none.
        sizes: (N, 2) width and height of the pictures, or None if they were not measured.
    """

    url: str
    keys: list[str]
    places: np.ndarray
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)


class TarShard:
    """The samples of a tar file.

    Args:
        url: of the file.
        cache: folder of its index.
        measured: whether the sizes of the pictures are wanted; they are read from their headers once, because
            the sizes in img2dataset's JSON can be those before it cropped.
    """

    def __init__(self, url: str, cache: Path | None = None, measured: bool = False) -> None:
        self.index = index_shard(url, cache, measured)
        self.sizes = self.index.sizes

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """Shard and key of a sample."""
        return f"{self.index.url}:{self.index.keys[row]}"

    def facts(self, row: int) -> Mapping[str, Any]:
        """The JSON of a sample, and its text file as ``"txt"``."""
        try:
            facts = json.loads(self._bytes(row, 2) or b"{}")
            text = self._bytes(row, 4).decode("utf-8")
        except ValueError as error:
            raise UnreadableExample(self.key(row), f"its JSON or text is damaged ({error})") from None
        return (facts if isinstance(facts, dict) else {}) | ({"txt": text} if text else {})

    def picture(self, row: int) -> bytes:
        """The picture file of a sample."""
        return self._bytes(row, 0)

    def _bytes(self, row: int, column: int) -> bytes:
        offset, size = (int(n) for n in self.index.places[row, column : column + 2])
        return read_range(self.index.url, offset, size)


def index_shard(url: str, cache: Path | None = None, measured: bool = False) -> ShardIndex:
    """The index of a shard; read from ``cache`` if it was made for the same file, else made and kept there.

    Raises:
        UserError: the shard cannot be read or is not a tar file.
    """
    filesystem, path, about = locate(url)
    content = keep_arrays(
        cache, [*stamp(url, about), measured], lambda: _scan(filesystem, path, url, about, measured)
    )
    return ShardIndex(
        url, [str(k) for k in content["keys"]], content["places"], content["sizes"] if measured else None
    )


def locate(url: str) -> tuple[Any, str, dict[str, Any]]:
    """The fsspec file system of a file, its path there and what is known of it.

    Raises:
        UserError: it cannot be opened.
    """
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(url)
        return filesystem, path, filesystem.info(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"shard {url} cannot be opened ({error}); check the path and the file system's package"
        ) from None


def stamp(url: str, about: Mapping[str, Any]) -> list[Any]:
    """What changes when a file does."""
    return [url, about.get("size"), str(about.get("mtime") or about.get("ETag") or about.get("LastModified"))]


def keep_arrays(
    cache: Path | None, name: list[Any], make: Callable[[], dict[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Arrays that are made once and kept in a folder under the hash of ``name``."""
    if cache is None:
        return make()
    kept = cache / f"{hashlib.sha256(json.dumps(name).encode()).hexdigest()[:24]}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as content:
            return dict(content)
    arrays = make()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, shared=True) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return arrays


def _scan(
    filesystem: Any, path: str, url: str, about: Mapping[str, Any], measured: bool
) -> dict[str, np.ndarray]:
    """Keys, places and sizes of the samples in a tar file."""
    samples: dict[str, list[int]] = {}
    end = 0
    try:
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                column = 0 if ending.lower() in PICTURES else {"json": 2, "txt": 4}.get(ending.lower())
                if member.isfile() and column is not None:
                    row = samples.setdefault(f"{folder}/{stem}" if folder else stem, [0] * 8)
                    row[column : column + 2] = [member.offset_data, member.size]
                    if measured and column == 0:
                        row[6:8] = picture_size(archive.extractfile(member))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"shard {url} is not a whole tar file ({error}); write or download it again"
        ) from None
    # A tar file ends with a block of zeros behind the last member, which fills its last block of 512 bytes.
    if about.get("size") is not None and about["size"] < -(-end // 512) * 512 + 512:
        raise UserError(
            f"shard {url} is not a whole tar file (its end is cut off); write or download it again"
        )
    samples = {key: row for key, row in samples.items() if row[1]}
    rows = np.array(list(samples.values()), dtype=np.int64).reshape(-1, 8)
    return {"keys": np.array(list(samples), dtype=str), "places": rows[:, :6], "sizes": rows[:, 6:]}


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes of a file that stays open."""
    if not size:
        return b""
    file = _open(url, os.getpid())
    file.seek(offset)
    return file.read(size)


@lru_cache(maxsize=64)
def _open(url: str, process: int) -> Any:
    """An open shard. Data workers are processes that share their parent's files, so each opens its own."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.open(path, "rb")
