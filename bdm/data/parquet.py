"""Parquet files, such as Hugging Face datasets saved as parquet.

A row is a sample, a row group is a shard.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..extras import import_extra
from .faults import open_shards
from .local import LocalFolder
from .order import WINDOW
from .pictures import PictureRules, picture_size, score_of
from .reading import NotWhole, ReadError, locate, refusing, retried, stamp
from .shards import ShardedSource, beside, expand_urls
from .source import UnreadableExample
from .tar import keep_arrays

logger = logging.getLogger("bdm")

#: What Arrow says of damaged content where it speaks as if of the system.
_DAMAGED = ("thrift", "orrupt", "page header", "decompress")


class ParquetShard:
    """The samples of a row group.

    A row group is read by one process of a machine, which leaves it in a folder that all of them map: each is
    read about once a pass, whatever the number of processes and workers, as long as the folder holds those
    that are shuffled together (``WINDOW``). Where nothing can be left, each process keeps its own in memory.

    Args:
        url: of the file.
        group: number of the row group.
        rows: samples in it.
        columns: that are read; the first holds the pictures, as bytes or as Hugging Face's ``{bytes, path}``.
        cache: folder for the sizes of the pictures.
        measured: whether those are wanted; they come from integer columns ``width`` and ``height`` where the
            file has them, else from the pictures' headers, once.
        scores: columns whose values are wanted.
        local: where row groups are left for all processes.
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
        scores: tuple[str, ...] = (),
        local: LocalFolder | None = None,
    ) -> None:
        self.url, self.group, self.columns, self._rows = url, group, columns, rows
        self._stamp, self._local = stamp(url, locate(url)[2]), local or LocalFolder()
        self.sizes: np.ndarray | None = None
        if measured:
            name = [*self._stamp, group, columns[0], "as seen"]
            self.sizes = keep_arrays(cache, name, self._picture_sizes)["sizes"]
        self.scores: Mapping[str, np.ndarray] = {}
        if scores:
            self.scores = keep_arrays(cache, [*self._stamp, group, "scores", *scores], self._scores(scores))

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
        try:
            left = self._local.get(json.dumps([*self._stamp, self.group, *self.columns]), self._leave)
            return _map_table(str(left)) if left else self._read()
        except FileNotFoundError:  # made room for another just now
            return self._read()
        except ReadError as error:
            raise UnreadableExample(f"{self.url}:{self.group}", str(error), "read") from None

    def _read(self) -> Any:
        table = _read_group(self.url, self.group, self.columns, os.getpid())
        if isinstance(table, str):
            raise UnreadableExample(f"{self.url}:{self.group}", table)
        return table

    def _leave(self, path: Path) -> None:
        import pyarrow

        table = self._read()
        with (
            refusing(),
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def _scores(self, names: tuple[str, ...]) -> Callable[[], dict[str, np.ndarray]]:
        def read() -> dict[str, np.ndarray]:
            table = _read_group(self.url, self.group, names, os.getpid())
            if isinstance(table, str):
                return {name: np.full(self._rows, np.nan) for name in names}
            return {name: np.array([score_of(v) for v in table[name].to_pylist()]) for name in names}

        return read

    def _picture_sizes(self) -> dict[str, np.ndarray]:
        names = set(_open(self.url, os.getpid()).schema_arrow.names)
        if {"width", "height"} <= names:
            table = _read_group(self.url, self.group, ("width", "height"), os.getpid())
            if isinstance(table, str):
                return {"sizes": np.zeros((self._rows, 2), dtype=np.int64)}
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
        shard_limit: share of the files that may be cut off, empty or missing.
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
        shard_limit: float = 0.05,
        **rules: Any,
    ) -> None:
        checked = PictureRules.of({"captions": {"text": 1.0}}, rules)
        columns = columns_of(picture, checked)
        found = expand_urls(urls)
        files = open_shards(
            [partial(groups_of, url, columns) for url in found], len(found), 0, shard_limit, logger.warning
        )
        openers = [
            partial(
                ParquetShard,
                url,
                group=group,
                rows=rows,
                columns=columns,
                cache=cache or beside(url),
                measured=checked.measured,
                scores=tuple(checked.min_scores),
            )
            for url, groups in files
            for group, rows in enumerate(groups)
        ]
        super().__init__(openers, checked, validation_shards, f"{urls} (row groups)", shard_limit)


def columns_of(picture: str, rules: PictureRules) -> tuple[str, ...]:
    """The columns that are read, that of the pictures first."""
    english = [rules.english] if rules.english else []
    return tuple(dict.fromkeys((picture, *rules.captions, *rules.min_scores, *english)))


def groups_of(url: str, columns: tuple[str, ...]) -> tuple[str, list[int]]:
    """A file and the rows of its row groups."""
    file = _open(url, os.getpid())
    if absent := [name for name in columns if name not in file.schema_arrow.names]:
        raise UserError(
            f"{url} has no column {absent[0]!r}; it has {', '.join(file.schema_arrow.names)}: set"
            " data.picture, data.captions, data.english and data.min_scores"
        )
    return url, [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


@lru_cache(maxsize=64)
def _open(url: str, process: int) -> Any:
    """An open file. Data workers are processes that share their parent's files, so each opens its own."""
    parquet = import_extra("a parquet file", "parquet")
    filesystem, path, _ = locate(url)

    def read() -> Any:
        try:
            return parquet.ParquetFile(filesystem.open(path, "rb"))
        except ValueError as error:  # of Arrow, for content
            raise NotWhole(
                f"{url} is not a whole parquet file ({str(error)[:120]}); write or download it again"
            ) from None

    try:
        return retried(read, url)
    except ReadError as error:
        raise UserError(f"{error}; start again when it can be") from None


@lru_cache(maxsize=WINDOW)
def _read_group(url: str, group: int, columns: tuple[str, ...], process: int) -> Any:
    """The table of a row group, or why its content is damaged.

    Raises:
        ReadError: the system or the store does not give it.
    """

    def read() -> Any:
        try:
            return _open(url, process).read_row_group(group, columns=list(columns))
        except ValueError as error:
            return f"row group {group} is damaged ({str(error)[:120]})"
        except OSError as error:
            if any(word in str(error) for word in _DAMAGED):
                return f"row group {group} is damaged ({str(error)[:120]})"
            _open.cache_clear()  # what stays open may be what is broken
            raise

    return retried(read, url)


@lru_cache(maxsize=2 * WINDOW)
def _map_table(path: str) -> Any:
    """A table that was left in a file, mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
