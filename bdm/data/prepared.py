"""Prepared shards: posterior moments and texts as ``bdm prepare`` wrote them, read by index.

A folder holds ``prepared.json`` (what prepared it), and for every shard ``train-00000.tar`` (or
``validation-``) with ``.safetensors`` and ``.json`` of each sample, and ``train-00000.json`` that says where
they lie, in which bucket each is and how well caption and picture agree. A shard is whole if its tar has the
size that stands there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors.torch import load as load_tensors

from ..errors import UserError
from .order import WINDOW
from .prepared_table import PreparedTable, check_sizes, facts_place, read_table
from .reading import ReadError, locate, read_range
from .source import Example, UnreadableExample

#: (number of a shard, place, size) -> bytes.
ReadBytes = Callable[[int, int, int], bytes]
#: Bytes between a sample's members that are read along.
NEAR = 4096

MANIFEST, DUPLICATES = "prepared.json", "duplicates.json"
FORMAT = 1


class _Rows(NamedTuple):
    """A shard's samples that are used: (N, 4) offset and size of tensors and JSON, (N,) buckets.

    ``size`` is that of the shard in bytes.
    """

    url: str
    places: np.ndarray
    buckets: np.ndarray
    size: int


class _Shards(Protocol):
    """The samples of a split that are used, by shard."""

    counts: list[int]
    #: Bytes of each shard.
    sizes: np.ndarray

    def __getitem__(self, shard: int) -> _Rows: ...

    def url(self, shard: int) -> str: ...

    def buckets(self) -> np.ndarray:
        """(N,) number of each sample's bucket."""
        ...


class _Listed:
    """Out of the tables of single shards."""

    def __init__(self, urls: list[str], min_score: float | None, left_out: dict[str, list[int]]) -> None:
        self._shards = [_read_rows(url, min_score, left_out.get(url.rpartition("/")[2], [])) for url in urls]
        self.counts = [len(shard.places) for shard in self._shards]
        self.sizes = np.array([shard.size for shard in self._shards])

    def url(self, shard: int) -> str:
        return self._shards[shard].url

    def __getitem__(self, shard: int) -> _Rows:
        return self._shards[shard]

    def buckets(self) -> np.ndarray:
        return np.concatenate([shard.buckets for shard in self._shards])


class _Mapped:
    """Out of the table of the split; a shard's rows are made when first used."""

    def __init__(self, folder: str, table: PreparedTable, min_score: float | None, duplicates: bool) -> None:
        self._folder, self._table = folder, table
        self._kept = table.kept(min_score, duplicates)
        starts = [0, *table.ends.tolist()]
        pairs = zip(starts, starts[1:], strict=False)
        self.counts = [b - a if self._kept is None else int(self._kept[a:b].sum()) for a, b in pairs]
        self.sizes = np.asarray(table.sizes)
        self._recent: dict[int, _Rows] = {}

    def url(self, shard: int) -> str:
        return f"{self._folder}/{self._table.names[shard]}"

    def __getitem__(self, shard: int) -> _Rows:
        if shard not in self._recent:
            if len(self._recent) >= 4 * WINDOW:
                self._recent.pop(next(iter(self._recent)))
            self._recent[shard] = self._make(shard)
        return self._recent[shard]

    def _make(self, shard: int) -> _Rows:
        rows = self._table.shard(shard)
        if self._kept is not None:
            end = int(self._table.ends[shard])
            rows = rows[self._kept[end - len(rows) : end]]
        place, size = rows["place"].astype(np.int64), rows["size"].astype(np.int64)
        places = np.stack([place, size, facts_place(place, size), rows["facts"].astype(np.int64)], axis=1)
        return _Rows(self.url(shard), places, np.array(rows["bucket"]), int(self.sizes[shard]))

    def buckets(self) -> np.ndarray:
        buckets = self._table.rows["bucket"]
        return buckets if self._kept is None else buckets[self._kept]


class PreparedSource:
    """Samples of prepared shards.

    Args:
        path: folder that ``bdm prepare`` wrote, anywhere fsspec reads.
        min_score: leave out samples whose Chinese CLIP score is lower (``scores.png`` shows their
            distribution).
        duplicates: keep near-duplicates; else of pictures with one perceptual hash only the first is used.
        split: "train" or "validation".

    Raises:
        UserError: no such folder, no whole shards, or nothing left by the filters.
    """

    def __init__(
        self, path: str, min_score: float | None = None, duplicates: bool = False, split: str = "train"
    ) -> None:
        self.origin = str(path).rstrip("/")
        self._arguments, self._split = (path, min_score, duplicates), split
        self.manifest = read_manifest(self.origin)
        #: By part, the source and the fingerprint of the models that prepared the data.
        self.fingerprints: dict[str, dict[str, str]] = self.manifest["models"]
        if min_score is not None and self.manifest["scorer"] is None:
            raise UserError(
                f"data.min_score {min_score}: {self.origin} was prepared without a scorer; leave it out"
            )
        self._shards = _open_shards(self.origin, split, min_score, duplicates)
        #: Samples of each shard: the order of a run keeps neighbours together (see ``draw_indices``).
        self.shard_sizes = self._shards.counts
        self._starts = [0, *accumulate(self.shard_sizes)]
        if not self._starts[-1]:
            raise UserError(
                f"{self.origin} holds no {split} samples that pass min_score {min_score}; prepare more data"
            )
        #: Bytes of a shard by its number, from a place on, so many; who keeps shards elsewhere reads there.
        self.read_bytes: ReadBytes = self._where_it_lies
        #: (N,) number of each sample's bucket, or None without buckets.
        self.bucket_of: np.ndarray | None = None
        if self.manifest["buckets"]:
            self.bucket_of = self._shards.buckets()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """A new process opens it for itself, instead of being sent what is mapped."""
        return type(self), (*self._arguments, self._split)

    def again(self) -> PreparedSource:
        """The same, opened anew."""
        return PreparedSource(*self._arguments, self._split)

    def url_of(self, shard: int) -> str:
        """Where a shard lies."""
        return self._shards.url(shard)

    @property
    def shard_bytes(self) -> np.ndarray:
        """(S,) bytes of each shard."""
        return self._shards.sizes

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        """Shard and row of an example."""
        shard, row = self._place(index)
        return f"{self.url_of(shard)}:{row}"

    def caption(self, index: int) -> str:
        """The heaviest caption of an example."""
        facts = self._facts(index)
        return max(zip(facts["weights"], facts["captions"], strict=True), key=lambda pair: pair[0])[1]

    def captions(self, index: int) -> list[str]:
        """All captions of an example."""
        return list(self._facts(index)["captions"])

    def __getitem__(self, index: int) -> Example:
        content, own = self._both(index)
        facts = self._read_facts(index, own)
        try:
            tensors = load_tensors(content)
        except Exception as error:  # safetensors has an exception of its own
            raise UnreadableExample(self.key(index), f"its tensors are damaged ({error})") from None
        if bad := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
            raise UnreadableExample(self.key(index), f"{bad[0]} is not finite in the prepared shard")
        captions = tuple(facts["captions"])
        prepared_text = tuple(tensors[f"text.{i}"] for i in range(len(captions)) if f"text.{i}" in tensors)
        return Example(
            captions[0],
            moments=tensors["moments"],
            captions=captions,
            caption_weights=tuple(facts["weights"]),
            prepared_text=prepared_text,
            english=facts.get("english"),
        )

    @property
    def validation(self) -> PreparedSource:
        """The samples that were prepared from the raw source's validation part."""
        return self._validation

    @cached_property
    def _validation(self) -> PreparedSource:
        return PreparedSource(*self._arguments, split="validation")

    def _place(self, index: int) -> tuple[int, int]:
        """Number of an example's shard, and of its row there."""
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _facts(self, index: int) -> dict[str, Any]:
        shard, row = self._place(index)
        offset, size = self._shards[shard].places[row, 2:].tolist()
        return self._read_facts(index, self._bytes(index, offset, size))

    def _read_facts(self, index: int, content: bytes) -> dict[str, Any]:
        try:
            return json.loads(content)
        except ValueError as error:
            raise UnreadableExample(self.key(index), f"its JSON is damaged ({error})") from None

    def _both(self, index: int) -> tuple[bytes, bytes]:
        """An example's tensors and its JSON, which is their neighbour: one request."""
        shard, row = self._place(index)
        first, size, then, rest = self._shards[shard].places[row].tolist()
        if not first + size <= then <= first + size + NEAR:
            return self._bytes(index, first, size), self._bytes(index, then, rest)
        content = self._bytes(index, first, then + rest - first)
        return content[:size], content[then - first :]

    def _bytes(self, index: int, offset: int, size: int) -> bytes:
        try:
            return self.read_bytes(self._place(index)[0], offset, size)
        except ReadError as error:
            raise UnreadableExample(self.key(index), str(error), "read") from None

    def _where_it_lies(self, shard: int, offset: int, size: int) -> bytes:
        return read_range(self.url_of(shard), offset, size)


def _read_json(url: str) -> dict[str, Any]:
    filesystem, path, _ = locate(url)
    try:
        return json.loads(filesystem.cat_file(path))
    except ValueError as error:
        raise UserError(f"{url} is damaged ({error}); delete it and run bdm prepare again") from None


def read_manifest(folder: str) -> dict[str, Any]:
    """What prepared a folder, and how.

    Raises:
        UserError: it is no finished folder, or one of another version.
    """
    try:
        manifest = _read_json(f"{folder}/{MANIFEST}")
        locate(f"{folder}/{DUPLICATES}")
    except UserError as error:
        raise UserError(
            f"{folder} is no finished folder of prepared shards ({error}); run bdm prepare to its end"
        ) from None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}; prepare the data"
            " again"
        )
    return manifest


def _open_shards(folder: str, split: str, min_score: float | None, duplicates: bool) -> _Shards:
    """The samples of a split: out of its table, or where there is none out of each shard's."""
    filesystem, path, _ = locate(folder)
    listed = filesystem.glob(f"{path}/{split}-*.tar", detail=True)
    found = {name.rpartition("/")[2]: about for name, about in sorted(listed.items())}
    table = read_table(folder, split)
    if table is not None and table.names == list(found):
        check_sizes(folder, table, found)
        return _Mapped(folder, table, min_score, duplicates)
    left_out = {} if duplicates else _read_json(f"{folder}/{DUPLICATES}")["rows"]
    return _Listed([f"{folder}/{name}" for name in found], min_score, left_out)


def _read_rows(url: str, min_score: float | None, left_out: list[int]) -> _Rows:
    table = _read_json(f"{url.removesuffix('.tar')}.json")
    size = locate(url)[2].get("size")
    if size is not None and size != table["size"]:
        raise UserError(
            f"shard {url} has {size} bytes, its table says {table['size']}; delete it and run bdm prepare"
            " again"
        )
    kept = np.ones(len(table["places"]), dtype=bool)
    kept[left_out] = False
    if min_score is not None:
        kept &= np.array(table["scores"], dtype=np.float64) >= min_score
    places = np.array(table["places"], dtype=np.int64).reshape(-1, 4)
    return _Rows(url, places[kept], np.array(table["buckets"], dtype=np.int16)[kept], table["size"])
