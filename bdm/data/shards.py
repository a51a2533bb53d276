"""Samples of shards, read by index: whatever a shard is, its source is this."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..extras import require_packages
from .buckets import nearest_bucket
from .faults import open_shards
from .members import PICTURES
from .pictures import PictureRules
from .source import Example
from .tar import TarShard

logger = logging.getLogger("bdm")


class Shard(Protocol):
    """Samples that lie together.

    Attributes:
        sizes: (N, 2) width and height of the pictures, 0 where unknown; None if they were not asked for.
        scores: (N,) values of each field of the rules' ``min_scores``, NaN where there is none.
    """

    sizes: np.ndarray | None
    scores: Mapping[str, np.ndarray]

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

    Shards that are not whole are left out and named in the log (see ``open_shards``).

    Args:
        openers: one function a shard, which opens it.
        rules: which samples are used and how.
        validation_shards: the last so many whole shards are kept for validation.
        origin: what messages call the whole.
        shard_limit: share of the shards that may be left out.
    """

    def __init__(
        self,
        openers: Sequence[Callable[[], Shard]],
        rules: PictureRules,
        validation_shards: int,
        origin: str,
        shard_limit: float = 0.05,
    ) -> None:
        if len(openers) <= validation_shards:
            raise UserError(
                f"{origin} matches {len(openers)} shards; more than the {validation_shards} kept for"
                " validation are needed"
            )
        bar = tqdm(openers, desc="indexing shards", mininterval=2, disable=len(openers) < 20)
        shards = open_shards(bar, len(openers), validation_shards, shard_limit, logger.warning)
        self._validation = _Opened(shards[len(shards) - validation_shards :], rules, origin)
        self._take(shards[: len(shards) - validation_shards], rules, origin)
        if not self._starts[-1]:
            raise UserError(
                f"{origin}: no shard holds a picture ({', '.join(PICTURES)}); is it a shard of another kind?"
            )
        if self.kept is not None and not self.kept.any():
            raise UserError(f"{origin}: no sample passes min_scores, min_side and max_aspect; lower them")

    def _take(self, shards: Sequence[Shard], rules: PictureRules, origin: str) -> None:
        self.shards, self.rules, self.size, self._origin = shards, rules, rules.size, origin
        #: Samples of each shard: the order of a run keeps neighbours together (see ``draw_indices``).
        self.shard_sizes = [len(shard) for shard in self.shards]
        self._starts = [0, *accumulate(self.shard_sizes)]
        sizes = [shard.sizes for shard in self.shards if shard.sizes is not None]
        measured = np.concatenate(sizes) if sizes else None
        #: (N,) number of each sample's bucket, or None without buckets.
        self.bucket_of: np.ndarray | None = None
        if rules.buckets and measured is not None:
            self.bucket_of = nearest_bucket(measured, rules.buckets)
        #: (N,) whether the filters let a sample pass, or None without filters.
        self.kept: np.ndarray | None = None
        if rules.filters and shards:
            scores = {name: np.concatenate([s.scores[name] for s in shards]) for name in rules.min_scores}
            self.kept = rules.passing(scores, measured)

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

    def _place(self, index: int) -> tuple[Shard, int]:
        shard = bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]


class _Opened(ShardedSource):
    """Samples of shards that are open."""

    def __init__(self, shards: Sequence[Shard], rules: PictureRules, origin: str) -> None:
        self._validation = self
        self._take(shards, rules, origin)


class ShardSource(ShardedSource):
    """Samples of tar shards.

    Args:
        urls: patterns of the shards (see ``expand_urls``).
        validation_shards: the last so many shards are kept for validation.
        cache: folder of the indices; beside the shards (``.index``) for local ones if None.
        shard_limit: share of the shards that may be cut off, empty or missing.
        rules: see ``PictureRules``; captions are JSON fields, and ``"txt"`` is the text file.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        validation_shards: int = 1,
        cache: Path | None = None,
        shard_limit: float = 0.05,
        **rules: Any,
    ) -> None:
        checked = PictureRules.of({}, rules)
        openers = [
            partial(TarShard, url, cache or beside(url), checked.measured, tuple(checked.min_scores))
            for url in expand_urls(urls)
        ]
        super().__init__(openers, checked, validation_shards, str(urls), shard_limit)


def beside(url: str) -> Path | None:
    """The folder of indices beside a local file, or None where nothing can be written."""
    folder = Path(url).parent
    return folder / ".index" if folder.is_dir() and os.access(folder, os.W_OK) else None
