"""Several corpora as one: how often each is drawn is a weight, and the order stays a pure function."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from .node import Node
from .partitions import own_share
from .positions import neighbours
from .shares import PlainOrder, Share, order_of
from .source import Example, Source, alike

#: Positions after which the pattern of the corpora comes again: weights are kept to a thousandth.
PERIOD = 1000


class PositionOrder(Protocol):
    """An order that knows which sample a position has, whatever the batches."""

    def where(self, positions: np.ndarray) -> np.ndarray: ...

    def indices(self, positions: np.ndarray) -> np.ndarray: ...


class Pattern:
    """Which corpus each position is of, and the how-manieth of it: each is spread evenly by its weight.

    Args:
        weights: of the corpora, relative to each other.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = np.array(weights) / sum(weights) * PERIOD
        counts = np.maximum(1, np.floor(exact).astype(int))
        order = np.argsort(counts - exact, kind="stable")
        for i in range(abs(PERIOD - int(counts.sum()))):
            counts[order[i % len(order)]] += 1 if counts.sum() < PERIOD else -1
        corpus = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        spread = np.lexsort((corpus, (rank + 0.5) / counts[corpus]))
        self._corpus, self._rank, self._counts = corpus[spread], rank[spread], counts

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus of each position, and the position in that corpus's own stream."""
        period, slot = np.divmod(positions, len(self._corpus))
        corpus = self._corpus[slot]
        return corpus, period * self._counts[corpus] + self._rank[slot]


class MixedSource:
    """Samples of several sources.

    Each goes through its own passes, in its own order. With buckets every batch is of one source.

    Args:
        sources: of one picture size; all with buckets, the same ones, or all without.
        weights: how often a sample of each is drawn, relative to the others.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if len(sources) != len(weights) or not sources or min(weights) <= 0:
            raise UserError(f"{len(sources)} corpora have the weights {list(weights)}; give each one above 0")
        self.sources, self.weights = list(sources), list(weights)
        self._starts = [0, *accumulate(len(source) for source in sources)]
        with_buckets = [getattr(source, "bucket_of", None) is not None for source in sources]
        if any(with_buckets) != all(with_buckets):
            raise UserError("some of the mixed corpora have buckets and others not; give all the same")
        #: Buckets of each source's samples, or None without buckets.
        self.bucket_of: list[Any] | None = None
        if all(with_buckets):
            self.bucket_of = [source.bucket_of for source in sources]  # pyright: ignore

    @property
    def fingerprints(self) -> dict[str, Any] | None:
        """Of the models that prepared all of them; None where nothing was prepared.

        Raises:
            UserError: they were prepared by different models.
        """
        all_of_them = [getattr(source, "fingerprints", None) for source in self.sources]
        first = all_of_them[0]
        for own in all_of_them[1:]:
            if _prints(own) != _prints(first):
                raise UserError(
                    "the mixed corpora were prepared by different models, or some of them were not prepared;"
                    " prepare all of them by the same"
                )
        return first

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[Any, int, int]:
        number = bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number], self._starts[number]

    def key(self, index: int) -> str:
        """What messages call an example."""
        source, own, _ = self._place(index)
        return source.key(own) if hasattr(source, "key") else str(index)

    def caption(self, index: int) -> str:
        """The caption of an example."""
        source, own, _ = self._place(index)
        return source.caption(own)

    def captions(self, index: int) -> list[str]:
        """All captions of an example."""
        source, own, _ = self._place(index)
        return source.captions(own) if hasattr(source, "captions") else [source.caption(own)]

    def __getitem__(self, index: int) -> Example:
        source, own, _ = self._place(index)
        return source[own]

    @cached_property
    def validation(self) -> MixedSource:
        """The validation examples of all."""
        return MixedSource([source.validation for source in self.sources], self.weights)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard of all sources."""
        sizes = [getattr(source, "shard_sizes", None) for source in self.sources]
        pairs = zip(self.sources, sizes, strict=True)
        return [int(n) for source, own in pairs for n in ([len(source)] if own is None else own)]

    def neighbours(self, index: int) -> Iterator[np.ndarray]:
        """Examples of the same source that may stand for one."""
        source, own, start = self._place(index)
        return (group + start for group in neighbours(source, own))

    def alike(self) -> np.ndarray:
        """Examples that may stand in one batch."""
        chosen = self.sources[:1] if self.bucket_of is not None else self.sources
        pairs = zip(chosen, self._starts, strict=False)
        return np.concatenate([np.asarray(alike(source)) + start for source, start in pairs])

    def corpus_of(self, describe: Any) -> str:
        """What the corpora are, each described by a function, and their weights."""
        pairs = zip(self.weights, self.sources, strict=True)
        return " + ".join(f"{weight:g} x ({describe(source)})" for weight, source in pairs)

    def on_node(self, node: Node, seed: int) -> MixedSource:
        """The same, each source as the machine reads it."""
        own: list[Any] = [
            source.on_node(node, seed) if hasattr(source, "on_node") else source  # pyright: ignore
            for source in self.sources
        ]
        return MixedSource(own, self.weights)

    def ahead(self, node: Node, size: int, seed: int) -> MixedAhead | None:
        """What fetches shards for the machine; None where none are kept."""
        shares = np.array(self.weights) / sum(self.weights)
        pairs = zip(self.sources, shares.tolist(), strict=True)
        parts = [
            (own, share)
            for source, share in pairs
            if hasattr(source, "ahead") and (own := source.ahead(node, size, seed)) is not None  # pyright: ignore
        ]
        return MixedAhead(parts) if parts else None

    def order(self, size: int, seed: int) -> Share:
        """Who takes which examples of a batch (see ``bdm.data.shares``)."""
        pattern = Pattern(self.weights)
        if self.bucket_of is not None:
            return self._by_batch(pattern, size, seed)
        orders = [_position_order(source, size, seed) for source in self.sources]

        def share(number: int, process: int, processes: int) -> list[tuple[int, int]]:
            positions = np.arange(number * size, (number + 1) * size)
            corpus, own = pattern(positions)
            where = np.empty(size)
            for k, order in enumerate(orders):
                where[corpus == k] = order.where(own[corpus == k])
            chosen = own_share(where, process, processes)
            found = np.empty(len(chosen), dtype=np.int64)
            for k, order in enumerate(orders):
                mine = corpus[chosen] == k
                found[mine] = order.indices(own[chosen[mine]]) + self._starts[k]
            return list(zip(positions[chosen].tolist(), found.tolist(), strict=True))

        return share

    def _by_batch(self, pattern: Pattern, size: int, seed: int) -> Share:
        shares = [order_of(source, size, seed) for source in self.sources]

        def share(number: int, process: int, processes: int) -> list[tuple[int, int]]:
            corpus, own = (int(a[0]) for a in pattern(np.array([number])))
            shift, start = (number - own) * size, self._starts[corpus]
            return [(p + shift, i + start) for p, i in shares[corpus](own, process, processes)]

        return share


class MixedAhead:
    """Fetches shards of several corpora, each as far as its share of the batches reaches."""

    def __init__(self, parts: Sequence[tuple[Any, float]]) -> None:
        self._parts = parts

    def reach(self, number: int) -> None:
        """Batches up to this number are about to be used."""
        for part, share in self._parts:
            part.reach(int(number * share))

    def close(self) -> None:
        """No more is fetched."""
        for part, _ in self._parts:
            part.close()


def _prints(models: dict[str, Any] | None) -> dict[str, str] | None:
    return None if models is None else {part: about["fingerprint"] for part, about in models.items()}


def _position_order(source: Any, size: int, seed: int) -> PositionOrder:
    return source.make_order(size, seed) if hasattr(source, "make_order") else PlainOrder(source, seed)
