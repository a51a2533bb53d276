"""What every data source gives: pictures with captions, by index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Attributes:
        caption: the text, in the language the source was built for.
        pixels: (3, H, W) uint8 in [0, 255], or None where only moments are kept.
        moments: (2C, h, w) mean and log variance of the VAE posterior, or None.
        captions: all captions where there are several; one of them is drawn for each use.
        caption_weights: how often each is drawn, relative to the others.
    """

    caption: str
    pixels: Tensor | None = None
    moments: Tensor | None = None
    captions: tuple[str, ...] = ()
    caption_weights: tuple[float, ...] = ()


class UnreadableExample(UserError):
    """An example that cannot be used; in training another takes its place.

    Attributes:
        key: what the example is called.
        reason: why not.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Source(Protocol):
    """A finite, indexable set of examples. Index ``i`` always gives the same example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def caption(self, index: int) -> str:
        """The caption of example ``index``, without reading its picture."""
        ...

    @property
    def validation(self) -> Source:
        """Examples that training never sees, for the validation loss."""
        ...


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels in [0, 255] -> float32 in [-1, 1], the range an SD1.5 VAE expects."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(pictures: Tensor) -> Tensor:
    """Float pictures in [-1, 1] -> uint8 in [0, 255]; values outside are clamped."""
    return ((pictures.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def crop_to_square(picture: Image.Image, size: int) -> Image.Image:
    """Resize a picture so that its shorter side is ``size`` and crop the centre square; never padded."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


#: Shards whose samples are shuffled together. More mix better, fewer read with fewer jumps.
WINDOW = 16


def draw_indices(position: int, count: int, sizes: Sequence[int], seed: int) -> list[int]:
    """Indices of the ``count`` samples that start at ``position`` in an endless shuffled stream.

    Each pass over the examples has an order of its own, a pure function of ``(seed, pass)``: the shards are shuffled, and the
    samples of every ``WINDOW`` successive ones together. A run that stops after any number of samples therefore continues
    in the same order, whatever the number of processes, and no pass repeats or leaves out an example.

    Args:
        position: samples drawn before.
        count: how many are wanted.
        sizes: samples of each shard; a source without shards is one.
        seed: of the run.
    """
    sizes, total = tuple(sizes), sum(sizes)
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), total)
        ends = _windows(sizes, seed, epoch)[1]
        window = bisect_right(ends, offset)
        start = ends[window - 1] if window else 0
        order = _order(sizes, seed, epoch, window)
        indices += order[offset - start : offset - start + count - len(indices)].tolist()
    return indices


@lru_cache(maxsize=2)
def _windows(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[list[list[int]], list[int]]:
    """The shards of each window of a pass, and how many samples lie before the end of each."""
    shards = torch.randperm(len(sizes), generator=_generator(seed, epoch)).tolist()
    windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
    return windows, list(accumulate(sum(sizes[shard] for shard in window) for window in windows))


@lru_cache(maxsize=4)
def _order(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> Tensor:
    starts = [0, *accumulate(sizes)]
    members = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in _windows(sizes, seed, epoch)[0][window]])
    return members[torch.randperm(len(members), generator=_generator(seed, epoch, window + 1))]


def _generator(seed: int, epoch: int, window: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch + (window << 40))
