"""Samples of an indexed corpus (see ``bdm.data.index``); a process holds the tables of its shards alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .bucket_partitions import BucketPartitionOrder
from .captions import read_facts
from .index import differences, read_index
from .indexing import Corpus, located, root_of
from .local import LocalFolder
from .node import Ahead, Node, Shards, check_room
from .parquet import ParquetShard, columns_of
from .partitions import WINDOW, PartitionOrder, Partitions
from .pictures import PictureRules
from .positions import walk
from .reading import ReadError
from .scanning import parse_sample
from .shares import Share
from .source import Example, UnreadableExample

#: Other shards that are asked where one has no example to stand for another.
OTHERS = 50


class IndexedSource:
    """Samples of an index.

    Args:
        index: folder that ``bdm index`` made.
        kind: of the files.
        urls: patterns of the files, as they were indexed; the folders in front of them may be others now.
        picture: column of the pictures, in parquet files.
        validation_shards: the last so many shards (row groups) are kept for validation.
        partitions: into which the corpus is split; a batch takes its share of each, and a machine reads the
            shards of its own ones.
        local: folder on this machine's disk in which shards of a store are kept; None reads each sample
            where it lies.
        local_gb: gigabytes of that folder at most.
        shard_limit: share of the shards that may be others than were indexed.
        rules: see ``PictureRules``.

    Raises:
        UserError: there is no such index, or it was made by other rules.
    """

    def __init__(
        self,
        index: Path,
        kind: Literal["shards", "parquet"],
        urls: str | tuple[str, ...],
        picture: str = "image",
        validation_shards: int = 1,
        partitions: int = 64,
        local: Path | None = None,
        local_gb: float = 50.0,
        shard_limit: float = 0.05,
        held_out: bool = False,
        **rules: Any,
    ) -> None:
        patterns = (urls,) if isinstance(urls, str) else tuple(urls)
        default = {} if kind == "shards" else {"captions": {"text": 1.0}}
        self.rules = PictureRules.of(default, rules)
        self.size, self._picture = self.rules.size, picture
        self.shard_limit = shard_limit
        self._arguments = (
            index, kind, urls, picture, validation_shards, partitions, local, local_gb, shard_limit
        )  # fmt: skip
        self._rest, self._partitions_of, self._held_out = rules, partitions, held_out
        self.index = read_index(Path(index))
        self._refuse_other(Corpus(kind=kind, urls=patterns, rules=self.rules, picture=picture))
        self._roots = tuple(root_of(pattern) for pattern in patterns)
        self._choose(validation_shards, held_out)
        self._folder = None if local is None else LocalFolder(Path(local), int(local_gb * 1e9))
        self._on(None)

    def _refuse_other(self, corpus: Corpus) -> None:
        about, rules = self.index.about, corpus.decisive
        if changed := [k for k in rules if about["rules"].get(k) != rules[k]]:
            seen = "; ".join(f"{k}: {about['rules'].get(k)} -> {rules[k]}" for k in changed)
            raise UserError(f"{self.index.folder} was made by other rules ({seen}); run bdm index again")
        tails = [
            [pattern[len(root_of(pattern)) :] for pattern in patterns]
            for patterns in (about["urls"], corpus.urls)
        ]
        if tails[0] != tails[1]:
            raise UserError(
                f"{self.index.folder} was made of {', '.join(about['urls'])}, and data.urls is"
                f" {', '.join(corpus.urls)}; run bdm index again"
            )

    def _choose(self, validation_shards: int, held_out: bool) -> None:
        shards = self.index.shards
        if len(shards) <= validation_shards:
            raise UserError(
                f"{self.index.folder} has {len(shards)} shards; more than the {validation_shards} kept for"
                " validation are needed"
            )
        cut = len(shards) - validation_shards
        self._first, last = (cut, len(shards)) if held_out else (0, cut)
        self._table = shards[self._first : last]
        #: Samples of each shard.
        self.shard_sizes = self._table["count"]
        self._origin = int(self._table["start"][0]) if len(self._table) else 0
        self._ends = np.cumsum(self.shard_sizes)
        if not len(self) and not held_out:
            raise UserError(f"{self.index.folder} has no samples beside those kept for validation")

    def _on(self, owned: np.ndarray | None) -> None:
        """Read as a machine that owns these shards (all, if None)."""
        crcs, sizes = self._table["crc"], self._table["bytes"]
        self._shards = Shards(self._url, sizes, crcs, self._folder, owned)
        self._row_groups = lru_cache(maxsize=2 * WINDOW * 64)(self._open_row_group)

    def __getstate__(self) -> dict[str, Any]:
        """What a new process needs to open it; arrays are mapped there anew."""
        return {
            "arguments": (*self._arguments, self._held_out),
            "rest": self._rest,
            "owned": self._owned,
            "fingerprint": self.index.fingerprint,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"], **state["rest"])
        if self.index.fingerprint != state["fingerprint"]:
            raise UserError(f"{self.index.folder} was made anew while it was used; start again")
        self._owned = state["owned"]
        self._on(self._owned)

    _owned: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def bucket_of(self) -> np.ndarray | None:
        """(N,) number of each sample's bucket, mapped, or None without buckets."""
        if not self.rules.buckets:
            return None
        return self.index.samples["bucket"][self._origin : self._origin + len(self)]

    @property
    def corpus(self) -> str:
        """What the corpus is; where it is the same, so is the order of the examples."""
        return f"{len(self)} examples in {len(self._table)} shards, index {self.index.fingerprint}"

    def changes_since(self, corpus: str) -> list[str]:
        """What changed since the corpus was that of another state."""
        return differences(self.index.folder, corpus.rpartition(" ")[2], self.index.fingerprint)

    def key(self, index: int) -> str:
        """Shard of an example and where in it."""
        shard, row = self._find(index)
        return f"{self._url(shard)}:{int(row['place'])}"

    def caption(self, index: int) -> str:
        """The heaviest caption of an example."""
        key, facts, _ = self._read(index)
        return self.rules.caption(key, facts)

    def captions(self, index: int) -> list[str]:
        """All captions of an example."""
        key, facts, _ = self._read(index)
        return [text for text, _ in self.rules.captions_of(key, facts)]

    def __getitem__(self, index: int) -> Example:
        key, facts, picture = self._read(index)
        return self.rules.example(key, facts, picture, int(self._find(index)[1]["bucket"]))

    def _find(self, index: int) -> tuple[int, np.void]:
        """Number of a sample's shard, and what the index says of it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, self.index.samples[self._origin + index]

    def _url(self, shard: int) -> str:
        name = self.index.names[self._first + shard].decode("utf-8", "surrogateescape")
        return located(name, self._roots)

    def _read(self, index: int) -> tuple[str, Mapping[str, Any], bytes]:
        shard, row = self._find(index)
        if int(self._table["group"][shard]) >= 0:
            group, number = self._row_groups(shard), int(row["place"])
            return group.key(number), group.facts(number), group.picture(number)
        return self._read_tar(shard, row)

    def _read_tar(self, shard: int, row: np.void) -> tuple[str, Mapping[str, Any], bytes]:
        url, place = self._url(shard), int(row["place"])
        try:
            content = self._shards.read(shard, place, int(row["length"]))
        except ReadError as error:
            raise UnreadableExample(f"{url}:{place}", str(error), "read") from None
        found = parse_sample(content, int(row["key"]))
        if found is None:
            raise UnreadableExample(url, "the shard is another than was indexed; run bdm index", "shard")
        key, members, picture = found
        facts, wrong = read_facts(*members.content)
        if wrong and not facts:
            raise UnreadableExample(f"{url}:{key}", wrong)
        return f"{url}:{key}", facts, picture

    def _open_row_group(self, shard: int) -> ParquetShard:
        about = self._table[shard]
        columns = columns_of(self._picture, self.rules)
        return ParquetShard(
            self._url(shard),
            group=int(about["group"]),
            rows=0,
            columns=columns,
            local=self._folder or LocalFolder(),
        )

    @property
    def validation(self) -> IndexedSource:
        """The shards kept for validation."""
        return self if self._held_out else self._validation

    @cached_property
    def _validation(self) -> IndexedSource:
        return IndexedSource(*self._arguments, held_out=True, **self._rest)

    # The order.

    def partitions(self, seed: int) -> Partitions:
        """The corpus in its partitions."""
        return Partitions(np.asarray(self.shard_sizes), seed, self._partitions_of)

    def make_order(self, size: int, seed: int) -> PartitionOrder | BucketPartitionOrder:
        """The order of batches of ``size``."""
        partitions = self.partitions(seed)
        buckets = self.bucket_of
        if buckets is None:
            return PartitionOrder(partitions, size)
        counts = self.index.buckets[self._first : self._first + len(self._table)]
        return BucketPartitionOrder(partitions, buckets, counts, size)

    def order(self, size: int, seed: int) -> Share:
        """Who takes which examples of a batch (see ``bdm.data.shares``)."""
        return self.make_order(size, seed).share

    def on_node(self, node: Node, seed: int) -> IndexedSource:
        """The same samples, read as a machine does that keeps the shards of its own partitions."""
        partitions = self.partitions(seed)
        owned = np.zeros(len(self._table), dtype=bool)
        for p in node.owned(partitions.count):
            owned[partitions.segments.shard[slice(*partitions.segments.cuts[p : p + 2])]] = True
        own = IndexedSource(*self._arguments, held_out=self._held_out, **self._rest)
        own._owned = owned
        own._on(owned)
        return own

    def ahead(self, node: Node, size: int, seed: int) -> Ahead | None:
        """What fetches a machine's shards ahead of time; None where none are kept."""
        if self._folder is None or int(self._table["group"].max(initial=-1)) >= 0:
            return None
        order = self.make_order(size, seed)
        owned = node.owned(order.partitions.count)
        mean = float(self._table["bytes"].mean())
        check_room(self._folder, int(2 * WINDOW * len(owned) * mean))
        return Ahead(self._shards, order.partitions, owned, order.windows_from)

    # Who may stand for whom.

    def neighbours(self, index: int) -> Iterator[np.ndarray]:
        """Examples that may stand for one: of its bucket, its own shard's and then some others'."""
        bucket, own = self.bucket_of, self._find(index)[0]
        yield self._members(own, None if bucket is None else int(bucket[index]))
        for shard in list(walk(len(self._table), index))[:OTHERS]:
            if shard != own:
                yield self._members(shard, None if bucket is None else int(bucket[index]))

    def _members(self, shard: int, bucket: int | None) -> np.ndarray:
        members = np.arange(self._ends[shard] - self.shard_sizes[shard], self._ends[shard])
        if bucket is None or self.bucket_of is None:
            return members
        return members[self.bucket_of[members] == bucket]

    def alike(self) -> np.ndarray:
        """Examples that may stand in one batch: those of the first shard that has some, of its fullest
        bucket.
        """
        shard = int(np.argmax(np.asarray(self.shard_sizes) > 0))
        members = self._members(shard, None)
        if self.bucket_of is None or not len(members):
            return members
        own = np.asarray(self.bucket_of[members])
        return members[own == np.bincount(own).argmax()]
