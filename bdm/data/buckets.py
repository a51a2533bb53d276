"""Aspect-ratio buckets: pictures keep about their shape, and every batch is of one shape.

The sizes are those of Stable Diffusion's trainers (NovelAI's aspect-ratio bucketing): multiples of a step
whose area is at most the square's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .order import draw_generator, order_of_window, windows_of_pass


def bucket_sizes(size: int, step: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(width, height) of the buckets, ordered by aspect.

    Args:
        size: side of the square; no bucket has a larger area.
        step: all sides are multiples of it (64 for SD1.5: 8 for the VAE, 8 for the UNet).
        max_aspect: the longer side is at most so many times the shorter one.

    Raises:
        UserError: ``size`` is no multiple of ``step``.
    """
    if size % step:
        raise UserError(
            f"buckets: size {size} is no multiple of step {step}; use another size or step, such as"
            f" {size // step * step}"
        )
    found = set()
    for width in range(step, int(size * max_aspect) + 1, step):
        height = size * size // width // step * step
        if height and max(width, height) <= max_aspect * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda pair: pair[0] / pair[1]))


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N,) int16 numbers of the buckets whose aspect is nearest (by its logarithm).

    Args:
        sizes: (N, 2) width and height; those that are unknown (0) get the most square bucket.
        buckets: see ``bucket_sizes``; with none every number is 0.
    """
    if not buckets:
        return np.zeros(len(sizes), dtype=np.int16)
    shapes = np.array(buckets, dtype=np.float64)
    aspects = np.log(shapes[:, 0] / shapes[:, 1])
    # Of buckets with one aspect (32x32 within 64x64) the largest is meant.
    areas = shapes.prod(1)
    sides = np.where((sizes > 0).all(1, keepdims=True), sizes, 1).astype(np.float64)
    distance = np.abs(np.log(sides[:, :1] / sides[:, 1:]) - aspects[None]) - 1e-9 * areas / areas.max()
    return distance.argmin(1).astype(np.int16)


class _Pass(NamedTuple):
    """How a pass is laid out.

    Windows of shards, samples of each bucket before each window, batches up to its end.
    """

    before: np.ndarray
    ends: list[int]


class BucketOrder:
    """An endless shuffled stream of batches, each of one bucket, by number.

    Each pass orders the samples as ``draw_indices`` does; those of one bucket, in that order, make up its
    batches. A batch is in the window of shards in which its last sample lies, and a window's batches are
    shuffled. All this is a pure function of ``(seed, pass)``, so a run continues at any batch. No pass
    repeats a sample. Those that do not fill the last batch of their bucket are left out of that pass
    (``left_out`` of them, others in each).

    Args:
        buckets: (N,) number of each sample's bucket.
        sizes: samples of each shard; their sum is N.
        batch: samples of a batch over all processes.
        seed: of the run.

    Raises:
        UserError: no bucket has enough samples for a batch.
    """

    def __init__(self, buckets: np.ndarray, sizes: Sequence[int], batch: int, seed: int) -> None:
        self.buckets, self.sizes, self.batch, self.seed = buckets, tuple(sizes), batch, seed
        kinds = int(buckets.max()) + 1
        starts = [0, *accumulate(self.sizes)]
        self._counts = np.stack(
            [np.bincount(buckets[a:b], minlength=kinds) for a, b in zip(starts, starts[1:])]
        )
        totals = self._counts.sum(0)
        #: Batches of a pass, the same in each.
        self.per_pass = int((totals // batch).sum())
        #: Samples that a pass leaves out.
        self.left_out = int((totals % batch).sum())
        if not self.per_pass:
            raise UserError(
                f"no bucket has {batch} samples, one batch (the fullest has {totals.max()}); use a smaller"
                " batch_size, a larger buckets.step, or more data"
            )
        self._pass = lru_cache(maxsize=2)(self._lay_out)
        self._members = lru_cache(maxsize=4)(self._group)
        self._batches = lru_cache(maxsize=2)(self._shuffle)

    def indices(self, number: int) -> list[int]:
        """The sample indices of batch ``number``."""
        epoch, place = divmod(number, self.per_pass)
        ends = self._pass(epoch).ends
        window = bisect_right(ends, place)
        bucket, which = self._batches(epoch, window)[place - (ends[window - 1] if window else 0)]
        return self._slice(epoch, bucket, which * self.batch, (which + 1) * self.batch)

    def _lay_out(self, epoch: int) -> _Pass:
        per_window = [self._counts[shards].sum(0) for shards in windows_of_pass(self.sizes, self.seed, epoch)]
        before = np.concatenate([np.zeros_like(self._counts[:1]), np.cumsum(per_window, axis=0)])
        return _Pass(before, (before[1:] // self.batch).sum(1).tolist())

    def _shuffle(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """The (bucket, number in that bucket) of the batches that end in a window."""
        first, last = self._pass(epoch).before[window : window + 2] // self.batch
        batches = [(b, k) for b in range(len(first)) for k in range(int(first[b]), int(last[b]))]
        order = torch.randperm(len(batches), generator=draw_generator(self.seed, epoch, -window - 1))
        return [batches[i] for i in order.tolist()]

    def _group(self, epoch: int, window: int) -> list[np.ndarray]:
        """A window's samples in their order, by bucket."""
        order = order_of_window(self.sizes, self.seed, epoch, window).numpy()
        own = self.buckets[order]
        return [order[own == b] for b in range(self._counts.shape[1])]

    def _slice(self, epoch: int, bucket: int, start: int, stop: int) -> list[int]:
        before = self._pass(epoch).before[:, bucket]
        window = int(np.searchsorted(before, start, side="right")) - 1
        found: list[int] = []
        while len(found) < stop - start:
            skip = max(0, start - int(before[window]))
            found += self._members(epoch, window)[bucket][skip : skip + stop - start - len(found)].tolist()
            window += 1
        return found
