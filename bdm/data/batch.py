"""Examples -> batches, each sample with a random generator of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .source import Example, Source, draw_indices


@dataclass(frozen=True)
class Batch:
    """Samples of one training step.

    Attributes:
        pixels: (B, 3, H, W) uint8, or None where VAE moments are cached.
        moments: (B, 2C, h, w) mean and log variance of the VAE posterior, or None.
        captions: B texts.
        indices: B indices into the source.
        generators: B random generators. All that is random for a sample is drawn from its own one, seeded by the run's
            seed and the sample's position in the stream, so it does not depend on how samples are batched or on how many
            processes share them.
    """

    pixels: Tensor | None
    moments: Tensor | None
    captions: list[str]
    indices: list[int]
    generators: list[torch.Generator]

    def __len__(self) -> int:
        return len(self.captions)

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def rand(self) -> Tensor:
        """(B,) uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators])

    def randint(self, high: int) -> Tensor:
        """(B,) integers in [0, high)."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators])


def make_batch(samples: list[tuple[int, int, Example]], seed: int) -> Batch:
    """Stack ``(position, index, example)`` triples."""
    positions, indices, examples = zip(*samples, strict=True)
    pixels = [e.pixels for e in examples if e.pixels is not None]
    moments = [e.moments for e in examples if e.moments is not None]
    return Batch(
        pixels=torch.stack(pixels) if pixels else None,
        moments=torch.stack(moments) if moments else None,
        captions=[e.caption for e in examples],
        indices=list(indices),
        generators=[torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**63) for position in positions],
    )


def fixed_batch(source: Source, count: int, seed: int) -> Batch:
    """``count`` evenly spread examples with fixed randomness, for validation."""
    count = min(count, len(source))
    step = len(source) / count
    return make_batch([(i, int(i * step), source[int(i * step)]) for i in range(count)], seed)


class _Positions(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, Example]:
        return (*key, self.source[key[1]])


def stream(
    source: Source, first: int, last: int, size: int, seed: int, process: int = 0, processes: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Batches number ``first`` to ``last`` - 1 of the endless shuffled stream; ``size`` is the global batch size.

    Each process gets its contiguous share of every batch.
    """
    share = size // processes

    def keys() -> Iterator[list[tuple[int, int]]]:
        for number in range(first, last):
            begin = number * size + process * share
            yield list(zip(range(begin, begin + share), draw_indices(begin, share, len(source), seed), strict=True))

    yield from DataLoader(
        _Positions(source),
        batch_sampler=keys(),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=lambda samples: make_batch(samples, seed),
        # Without one of its own it would draw from the global generator whenever a run starts, also when one goes on.
        generator=torch.Generator().manual_seed(seed),
    )
