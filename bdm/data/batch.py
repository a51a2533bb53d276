"""Examples -> batches, each sample with a random generator of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .source import Example, Source, UnreadableExample, draw_indices


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
    generators = [torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**63) for position in positions]
    pixels = [e.pixels for e in examples if e.pixels is not None]
    moments = [e.moments for e in examples if e.moments is not None]
    return Batch(
        pixels=torch.stack(pixels) if pixels else None,
        moments=torch.stack(moments) if moments else None,
        captions=[_draw_caption(e, g) for e, g in zip(examples, generators, strict=True)],
        indices=list(indices),
        generators=generators,
    )


def _draw_caption(example: Example, generator: torch.Generator) -> str:
    if len(example.captions) < 2:
        return example.caption
    weights = torch.tensor(example.caption_weights, dtype=torch.float32)
    return example.captions[int(torch.multinomial(weights, 1, generator=generator))]


def fixed_batch(source: Source, count: int, seed: int) -> Batch:
    """``count`` evenly spread examples with fixed randomness, for validation; unusable ones are left out."""
    count = min(count, len(source))
    step = len(source) / count
    samples = []
    for i in range(count):
        with suppress(UnreadableExample):
            samples.append((i, int(i * step), source[int(i * step)]))
    if not samples:
        raise UserError(f"none of {count} validation examples can be used; look at the data or its filters")
    return make_batch(samples, seed)


class _Positions(Dataset):
    """Examples by (position, index); one that cannot be used gives way to the next that can.

    Who takes whose place depends on the source alone, so it is the same for every number of processes and after a resume.
    """

    #: So many uses are looked at before the share of unreadable ones counts.
    AT_LEAST = 200

    def __init__(self, source: Source, log: Path | None, limit: float) -> None:
        self.source, self.log, self.limit = source, log, limit
        self.used = self.unreadable = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, Example] | UserError:
        position, index = key
        while True:
            self.used += 1
            try:
                return position, index, self.source[index]
            except UnreadableExample as error:
                self.unreadable += 1
                if self.log is not None:
                    with open(self.log, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": error.key, "reason": error.reason}, ensure_ascii=False) + "\n")
                if self.unreadable > self.limit * max(self.used, self.AT_LEAST):
                    # Returned, not raised: a data worker would wrap it into a traceback.
                    return UserError(
                        f"{self.unreadable} of {self.used} examples cannot be used, the last {error.key} ({error.reason}); "
                        f"allowed is a share of {self.limit:g} (unreadable_limit): look at "
                        f"{self.log or 'the data'}, mend it or its filters"
                    )
            index = (index + 1) % len(self.source)


def stream(
    source: Source,
    first: int,
    last: int,
    size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    log: Path | None = None,
    unreadable_limit: float = 0.05,
) -> Iterator[Batch]:
    """Batches number ``first`` to ``last`` - 1 of the endless shuffled stream; ``size`` is the global batch size.

    Each process gets its contiguous share of every batch.

    Args:
        source: examples by index.
        first: number of the first batch.
        last: number behind the last batch.
        size: examples of a batch over all processes.
        seed: of the order and of every sample's generator.
        process: number of this process.
        processes: how many there are.
        workers: reading processes beside this one.
        log: file that names the examples that could not be used, one JSON object a line.
        unreadable_limit: share of such examples above which the stream ends.

    Raises:
        UserError: too many examples cannot be used.
    """
    share = size // processes
    sizes = getattr(source, "shard_sizes", None) or [len(source)]

    def keys() -> Iterator[list[tuple[int, int]]]:
        for number in range(first, last):
            begin = number * size + process * share
            yield list(zip(range(begin, begin + share), draw_indices(begin, share, sizes, seed), strict=True))

    def collate(samples: list[Any]) -> Batch | UserError:
        return next((s for s in samples if isinstance(s, UserError)), None) or make_batch(samples, seed)

    batches = DataLoader(
        _Positions(source, log, unreadable_limit),
        batch_sampler=keys(),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=collate,
        # Without one of its own it would draw from the global generator whenever a run starts, also when one goes on.
        generator=torch.Generator().manual_seed(seed),
    )
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch
