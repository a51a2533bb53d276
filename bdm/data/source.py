"""What every data source gives: pictures with captions, by index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Attributes:
        caption: the text, in the language the source was built for.
        pixels: (3, H, W) uint8 in [0, 255], or None where only moments are kept.
        moments: (2C, h, w) mean and log variance of the VAE posterior, or None.
    """

    caption: str
    pixels: Tensor | None = None
    moments: Tensor | None = None


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


def draw_indices(position: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of the ``count`` samples that start at ``position`` in an endless shuffled stream.

    Each pass over the ``size`` examples is a permutation of its own, a pure function of ``(seed, pass)``. A run that
    stops after any number of samples therefore continues in the same order, whatever the number of processes.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), size)
        indices += _order(epoch, size, seed)[offset : offset + count - len(indices)].tolist()
    return indices


@lru_cache(maxsize=2)
def _order(epoch: int, size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
