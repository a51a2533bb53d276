"""Samples of shards, read by index: whatever a shard is, its source is this."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..extras import require_packages
from .buckets import nearest_bucket
from .pictures import PictureRules
from .source import Example
from .tar import PICTURES, TarShard


class Shard(Protocol):
    """Samples that lie together.

    Attributes:
        sizes: (N, 2) width and height of the pictures, 0 where unknown; None if they were not asked for.
    """

    sizes: np.ndarray | None

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What messages call a sample."""
        ...

    def facts(self, row: int) -> Mapping[str, Any]:
        """Captions and scores of a sample."""
        ...

    def picture(self, row: int) -> bytes:
        """The picture file of a sample."""
        ...


def expand_urls(patterns: str | Sequence[str]) -> list[str]:
    """Shard URLs for patterns with braces (``{00000..00099}``, ``{a,b}``) and, for anything fsspec lists,
    ``*``.

    Raises:
        UserError: a pattern that matches nothing.
    """
    require_packages("data in shards")
    import fsspec
    from webdataset.shardlists import expand_urls as expand_braces

    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = []
        for url in expand_braces(pattern):
            if "*" in url or "?" in url:
                filesystem, path = fsspec.url_to_fs(url)
                found += [
                    filesystem.unstrip_protocol(p) if "://" in url else str(p)
                    for p in sorted(filesystem.glob(path))
                ]
            else:
                found.append(url)
        if not found:
            raise UserError(
                f"{pattern} matches no shard; give tar files, such as /data/{{00000..00099}}.tar or"
                " /data/*.tar"
            )
        urls += found
    return urls


class ShardedSource:
    """Samples of shards of one kind.

    Args:
        openers: one function a shard, which opens it; those of shards kept for validation are called only
            when asked for.
        rules: which samples are used and how.
        validation_shards: the last so many shards are kept for validation.
        origin: what messages call the whole.
        held_out: give the validation shards.
    """

    def __init__(
        self,
        openers: Sequence[Callable[[], Shard]],
        rules: PictureRules,
        validation_shards: int,
        origin: str,
        held_out: bool = False,
    ) -> None:
        if len(openers) <= validation_shards:
            raise UserError(
                f"{origin} matches {len(openers)} shards; more than the {validation_shards} kept for"
                " validation are needed"
            )
        self._arguments = (openers, rules, validation_shards, origin)
        self.rules, self.size = rules, rules.size
        chosen = openers[-validation_shards:] if held_out else openers[: len(openers) - validation_shards]
        bar = tqdm(chosen, desc="indexing shards", mininterval=2, disable=len(chosen) < 20)
        self.shards = [opener() for opener in bar]
        #: Samples of each shard: the order of a run keeps neighbours together (see ``draw_indices``).
        self.shard_sizes = [len(shard) for shard in self.shards]
        self._starts = [0, *accumulate(self.shard_sizes)]
        if not self._starts[-1]:
            raise UserError(
                f"{origin}: no shard holds a picture ({', '.join(PICTURES)}); is it a shard of another kind?"
            )
        #: (N,) number of each sample's bucket, or None without buckets.
        self.bucket_of: np.ndarray | None = None
        if rules.buckets:
            sizes = np.concatenate([shard.sizes for shard in self.shards if shard.sizes is not None])
            self.bucket_of = nearest_bucket(sizes, rules.buckets)

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        """The name by which messages call an example: shard and key."""
        shard, row = self._place(index)
        return shard.key(row)

    def caption(self, index: int) -> str:
        """The heaviest caption of an example."""
        shard, row = self._place(index)
        return self.rules.caption(shard.key(row), shard.facts(row))

    def captions(self, index: int) -> list[str]:
        """All captions of an example."""
        shard, row = self._place(index)
        return [text for text, _ in self.rules.captions_of(shard.key(row), shard.facts(row))]

    def __getitem__(self, index: int) -> Example:
        shard, row = self._place(index)
        bucket = int(self.bucket_of[index]) if self.bucket_of is not None else 0
        return self.rules.example(shard.key(row), shard.facts(row), shard.picture(row), bucket)

    @property
    def validation(self) -> ShardedSource:
        """The shards kept for validation."""
        return self._validation

    @cached_property
    def _validation(self) -> ShardedSource:
        return ShardedSource(*self._arguments, held_out=True)

    def _place(self, index: int) -> tuple[Shard, int]:
        shard = bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]


class ShardSource(ShardedSource):
    """Samples of tar shards.

    Args:
        urls: patterns of the shards (see ``expand_urls``).
        validation_shards: the last so many shards are kept for validation.
        cache: folder of the indices; beside the shards (``.index``) for local ones if None.
        rules: see ``PictureRules``; captions are JSON fields, and ``"txt"`` is the text file.
    """

    def __init__(
        self, urls: str | Sequence[str], validation_shards: int = 1, cache: Path | None = None, **rules: Any
    ) -> None:
        checked = PictureRules.of({}, rules)
        measured = bool(checked.buckets)
        openers = [partial(TarShard, url, cache or beside(url), measured) for url in expand_urls(urls)]
        super().__init__(openers, checked, validation_shards, str(urls))


def beside(url: str) -> Path | None:
    """The folder of indices beside a local file, or None where nothing can be written."""
    folder = Path(url).parent
    return folder / ".index" if folder.is_dir() and os.access(folder, os.W_OK) else None
