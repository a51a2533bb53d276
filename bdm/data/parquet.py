"""Parquet files, such as Hugging Face datasets saved as parquet.

A row is a sample, a row group is a shard.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..extras import import_extra
from .order import WINDOW
from .pictures import PictureRules, picture_size
from .shards import ShardedSource, beside, expand_urls
from .source import UnreadableExample
from .tar import keep_arrays, locate, stamp


class ParquetShard:
    """The samples of a row group.

    The last row groups are kept in memory, as many as are shuffled together (``WINDOW``), so that each is
    read once a pass: files with small row groups (Hugging Face writes 100 pictures into one) need the least
    memory.

    Args:
        url: of the file.
        group: number of the row group.
        rows: samples in it.
        columns: that are read; the first holds the pictures, as bytes or as Hugging Face's ``{bytes, path}``.
        cache: folder for the sizes of the pictures.
        measured: whether those are wanted; they come from integer columns ``width`` and ``height`` where the
            file has them, else from the pictures' headers, once.
    """

    def __init__(
        self,
        url: str,
        *,
        group: int,
        rows: int,
        columns: tuple[str, ...],
        cache: Path | None = None,
        measured: bool = False,
    ) -> None:
        self.url, self.group, self.columns, self._rows = url, group, columns, rows
        self.sizes: np.ndarray | None = None
        if measured:
            name = [*stamp(url, locate(url)[2]), group, columns[0]]
            self.sizes = keep_arrays(cache, name, self._picture_sizes)["sizes"]

    def __len__(self) -> int:
        return self._rows

    def key(self, row: int) -> str:
        """File, row group and row of a sample."""
        return f"{self.url}:{self.group}/{row}"

    def facts(self, row: int) -> Mapping[str, Any]:
        """The other columns of a sample."""
        return {name: self._table()[name][row].as_py() for name in self.columns[1:]}

    def picture(self, row: int) -> bytes:
        """The picture file of a sample."""
        value = self._table()[self.columns[0]][row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise UnreadableExample(self.key(row), f"its column {self.columns[0]} holds no picture's bytes")
        return content

    def _table(self) -> Any:
        return _read_group(self.url, self.group, self.columns, os.getpid())

    def _picture_sizes(self) -> dict[str, np.ndarray]:
        names = set(_open(self.url, os.getpid()).schema_arrow.names)
        if {"width", "height"} <= names:
            table = _read_group(self.url, self.group, ("width", "height"), os.getpid())
            pairs = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
            sizes = [pair if all(isinstance(side, int) for side in pair) else (0, 0) for pair in pairs]
        else:
            sizes = [self._size_of(row) for row in range(self._rows)]
        return {"sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2)}

    def _size_of(self, row: int) -> tuple[int, int]:
        try:
            return picture_size(io.BytesIO(self.picture(row)))
        except UnreadableExample:
            return 0, 0


class ParquetSource(ShardedSource):
    """Samples of parquet files.

    Args:
        urls: patterns of the files (see ``expand_urls``).
        picture: column of the pictures.
        validation_shards: the last so many row groups, over all files, are kept for validation.
        cache: folder for the sizes of pictures; beside the files (``.index``) for local ones if None.
        rules: see ``PictureRules``; captions and scores are columns.

    Raises:
        UserError: a file that is no parquet file or lacks a column.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        picture: str = "image",
        validation_shards: int = 1,
        cache: Path | None = None,
        **rules: Any,
    ) -> None:
        checked = PictureRules.of({"captions": {"text": 1.0}}, rules)
        english = [checked.english] if checked.english else []
        columns = tuple(dict.fromkeys((picture, *checked.captions, *checked.min_scores, *english)))
        openers = []
        for url in expand_urls(urls):
            file = _open(url, os.getpid())
            if absent := [name for name in columns if name not in file.schema_arrow.names]:
                raise UserError(
                    f"{url} has no column {absent[0]!r}; it has {', '.join(file.schema_arrow.names)}: set"
                    " data.picture, data.captions, data.english and data.min_scores"
                )
            groups = [
                file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)
            ]
            kept = cache or beside(url)
            openers += [
                partial(
                    ParquetShard,
                    url,
                    group=group,
                    rows=rows,
                    columns=columns,
                    cache=kept,
                    measured=bool(checked.buckets),
                )
                for group, rows in enumerate(groups)
            ]
        super().__init__(openers, checked, validation_shards, f"{urls} (row groups)")


@lru_cache(maxsize=64)
def _open(url: str, process: int) -> Any:
    """An open file. Data workers are processes that share their parent's files, so each opens its own."""
    parquet = import_extra("a parquet file", "parquet")
    filesystem, path, _ = locate(url)
    try:
        return parquet.ParquetFile(filesystem.open(path, "rb"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{url} is not a whole parquet file ({str(error)[:120]}); write or download it again"
        ) from None


@lru_cache(maxsize=WINDOW)
def _read_group(url: str, group: int, columns: tuple[str, ...], process: int) -> Any:
    try:
        return _open(url, process).read_row_group(group, columns=list(columns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"row group {group} of {url} cannot be read ({str(error)[:120]}); write or download it again"
        ) from None
