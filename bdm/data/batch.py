"""Examples -> batches, each sample with a random generator of its own."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..files import append_line
from .buckets import BucketOrder
from .order import draw_indices
from .source import Example, Source, UnreadableExample

logger = logging.getLogger("bdm")


@dataclass(frozen=True)
class Batch:
    """Samples of one training step.

    Attributes:
        pixels: (B, 3, H, W) uint8, or None where VAE moments are cached.
        moments: (B, 2C, h, w) mean and log variance of the VAE posterior, or None.
        captions: B texts.
        prepared_text: what was prepared for these captions (see ``Example``), or None.
        indices: B indices into the source.
        generators: B random generators. All that is random for a sample is drawn from its own one, seeded by
            the run's seed and the sample's position in the stream, so it does not depend on how samples are
            batched or on how many processes share them.
        english: B English captions, where they are known (see ``Example``).
        bilingual: B pairs of a native and an English text, where there are any (likewise).
    """

    pixels: Tensor | None
    moments: Tensor | None
    captions: list[str]
    prepared_text: list[Tensor] | None
    indices: list[int]
    generators: list[torch.Generator]
    english: Sequence[str | None] = ()
    bilingual: Sequence[tuple[str, str] | None] = ()

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def text_inputs(self) -> Sequence[str | Tensor]:
        """What a text encoder is given: the captions, or what was prepared for them."""
        return self.captions if self.prepared_text is None else self.prepared_text

    def randn(self, *shape: int) -> Tensor:
        """``(B, *shape)`` standard normal float32."""
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
    generators = [
        torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**63) for position in positions
    ]
    chosen = [_draw_caption(e, g) for e, g in zip(examples, generators, strict=True)]
    pixels = [_draw_flip(e, g) for e, g in zip(examples, generators, strict=True) if e.pixels is not None]
    moments = [e.moments for e in examples if e.moments is not None]
    prepared = [e.prepared_text[i] for e, i in zip(examples, chosen, strict=True) if e.prepared_text]
    return Batch(
        pixels=torch.stack(pixels) if pixels else None,
        moments=torch.stack(moments) if moments else None,
        captions=[e.captions[i] if e.captions else e.caption for e, i in zip(examples, chosen, strict=True)],
        prepared_text=prepared or None,
        indices=list(indices),
        generators=generators,
        english=[e.english for e in examples],
        bilingual=[e.bilingual for e in examples],
    )


def _draw_caption(example: Example, generator: torch.Generator) -> int:
    if len(example.captions) < 2:
        return 0
    weights = torch.tensor(example.caption_weights, dtype=torch.float32)
    return int(torch.multinomial(weights, 1, generator=generator))


def _draw_flip(example: Example, generator: torch.Generator) -> Tensor:
    assert example.pixels is not None
    # Without flips nothing is drawn, so the stream of a run without them stays what it is.
    mirrored = example.flip > 0 and float(torch.rand(1, generator=generator)) < example.flip
    return example.pixels.flip(-1) if mirrored else example.pixels


def fixed_batch(source: Source, count: int, seed: int) -> Batch:
    """``count`` examples with fixed randomness, for validation; unusable ones are left out.

    They are drawn, always the same: evenly spread ones would miss whole kinds of a source whose rows repeat
    in a rhythm. Of a source with buckets those of the fullest bucket are taken, because a batch has one
    shape.
    """
    buckets = getattr(source, "bucket_of", None)
    members = (
        range(len(source)) if buckets is None else np.flatnonzero(buckets == np.bincount(buckets).argmax())
    )
    count = min(count, len(members))
    if not count:
        raise UserError(
            "there are no validation examples; take more of the data, or keep more of them for validation"
        )
    chosen = sorted(random.Random(len(members)).sample(range(len(members)), count))
    samples = []
    for i, place in enumerate(chosen):
        index = int(members[place])
        with suppress(UnreadableExample):
            samples.append((i, index, source[index]))
    if not samples:
        raise UserError(f"none of {count} validation examples can be used; look at the data or its filters")
    return make_batch(samples, seed)


class _Positions(Dataset):
    """Examples by (position, index); one that cannot be used gives way to the next of its bucket that can.

    Who takes whose place depends on the source alone, so it is the same for every number of processes and
    after a resume.
    """

    #: So many uses are looked at before the share of unreadable ones counts.
    AT_LEAST = 200
    #: Scores and sizes are meant to leave out many; damage and captions in another field are mistakes.
    MISTAKES = ("unreadable", "caption")

    def __init__(self, source: Source, log: Path | None, limit: float) -> None:
        self.source, self.log, self.limit = source, log, limit
        self.used = self.unreadable = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, Example] | UserError:
        position, first = key
        index = first
        while True:
            self.used += 1
            try:
                return position, index, self.source[index]
            except UnreadableExample as error:
                index = self._next(index)
                # Returned, not raised: a data worker would wrap it into a traceback.
                if (end := self._note(error)) is not None:
                    return end
                if index == first:
                    return self._too_many(error)

    def _note(self, error: UnreadableExample) -> UserError | None:
        """Write an example down that cannot be used; gives what ends the run, if that does."""
        self.unreadable += error.kind in self.MISTAKES
        if self.log is not None:
            try:
                append_line(self.log, {"key": error.key, "reason": error.reason})
            except UserError as full:
                return full
        allowed = self.limit * max(self.used, self.AT_LEAST)
        return self._too_many(error) if self.unreadable > allowed else None

    def _too_many(self, error: UnreadableExample) -> UserError:
        return UserError(
            f"{self.unreadable} of {self.used} examples cannot be used, the last {error.key}"
            f" ({error.reason}); allowed is a share of {self.limit:g} (unreadable_limit), and not all that"
            f" could take its place: see {self.log or 'the data'}, mend it or its filters"
        )

    def _next(self, index: int) -> int:
        buckets, last = getattr(self.source, "bucket_of", None), index
        index = (index + 1) % len(self.source)
        while buckets is not None and buckets[index] != buckets[last]:
            index = (index + 1) % len(self.source)
        return index


def stream(
    source: Source,
    first: int,
    last: int,
    size: int,
    seed: int,
    *,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    log: Path | None = None,
    unreadable_limit: float = 0.05,
) -> Iterator[Batch]:
    """Batches number ``first`` to ``last`` - 1 of the endless shuffled stream.

    ``size`` is the global batch size.

    Each process gets its contiguous share of every batch. Of a source with buckets every batch is of one, and
    those samples that do not fill a bucket's last batch are left out of a pass (see ``BucketOrder``).

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
    released = multiprocessing.Event()
    # Python ends its children before it leaves; they must let it.
    multiprocessing.util.Finalize(None, released.set, exitpriority=100)
    batches = DataLoader(
        _Positions(source, log, unreadable_limit),
        batch_sampler=_shares(_order(source, size, seed), first, last, size, process, processes),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=partial(_collate, seed),
        # Without one of its own it would draw from the global generator whenever a run starts, also when one
        # goes on.
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=partial(_outlive_signals, released),
    )
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        released.set()


def _shares(
    draw: Callable[[int], list[int]], first: int, last: int, size: int, process: int, processes: int
) -> Iterator[list[tuple[int, int]]]:
    """The (position, index) pairs of a process's share of each batch."""
    share = size // processes
    begin = process * share
    for number in range(first, last):
        positions = range(number * size + begin, number * size + begin + share)
        yield list(zip(positions, draw(number)[begin : begin + share], strict=True))


def _collate(seed: int, samples: list[Any]) -> Batch | UserError:
    return next((s for s in samples if isinstance(s, UserError)), None) or make_batch(samples, seed)


def _outlive_signals(released: Event, _: int) -> None:
    """Schedulers signal whole jobs.

    Who trains decides when to stop, and needs its data workers until it has let them go.
    """

    def leave(*_: object) -> None:
        if released.is_set():
            os._exit(0)

    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)


def _order(source: Source, size: int, seed: int) -> Callable[[int], list[int]]:
    """Number of a batch -> indices of its examples over all processes."""
    sizes = getattr(source, "shard_sizes", None) or [len(source)]
    buckets = getattr(source, "bucket_of", None)
    if buckets is None:
        return lambda number: draw_indices(number * size, size, sizes, seed)
    order = BucketOrder(buckets, sizes, size, seed)
    if order.left_out > 0.01 * len(source):
        logger.warning(
            "%d of %d samples fill no batch of their bucket and are left out of a pass",
            order.left_out,
            len(source),
        )
    return order.indices
