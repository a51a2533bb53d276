"""Examples -> batches, each sample with a random generator of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from .faults import Budget
from .node import Ahead, Node
from .positions import Drawn
from .positions import Positions as _Positions
from .shares import order_of
from .source import Example, Source, UnreadableExample, alike


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


def fixed_batch(source: Source, count: int, seed: int, part: Callable[[int], range] = range) -> Batch:
    """``count`` examples with fixed randomness, for validation; unusable ones are left out.

    ``part`` gives the places of them that are wanted; where none of those can be used another one stands in.

    They are drawn, always the same: evenly spread ones would miss whole kinds of a source whose rows repeat
    in a rhythm. Of a source with buckets those of the fullest bucket are taken, because a batch has one
    shape.
    """
    members = alike(source)
    count = min(count, len(members))
    if not count:
        raise UserError(
            "there are no validation examples; take more of the data, or keep more of them for validation"
        )
    chosen = sorted(random.Random(len(members)).sample(range(len(members)), count))
    wanted = part(count)
    samples = []
    for i in (*wanted, *(i for i in range(count) if i not in wanted)):
        if samples and i not in wanted:
            break
        index = int(members[chosen[i]])
        with suppress(UnreadableExample):
            samples.append((i, index, source[index]))
    if not samples:
        raise UserError(f"none of {count} validation examples can be used; look at the data or its filters")
    return make_batch(samples, seed)


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
    read_limit: float = 0.05,
    faults: Counter[str] | None = None,
    node: Node | None = None,
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
        unreadable_limit: share of damaged examples above which the stream ends.
        read_limit: share of examples that the system or the store could not read above which it ends.
        faults: is given the number of faults of each kind ("sample", "read", "shard") so far.
        node: this process's machine, if it is not the one that the launcher tells of.

    Raises:
        UserError: too many examples cannot be used.
    """
    source, ahead = _on_node(source, node or Node.of(process, processes), process, size, seed)
    budget = Budget(
        unreadable_limit,
        read_limit,
        getattr(source, "shard_limit", 0.05),
        _shards_of(source),
        log,
        counts=Counter() if faults is None else faults,
    )
    released = multiprocessing.Event()
    # Python ends its children before it leaves; they must let it.
    multiprocessing.util.Finalize(None, released.set, exitpriority=100)
    share = order_of(source, size, seed)
    shares = (share(number, process, processes) for number in range(first, last))
    batches: Any = DataLoader(
        _Positions(source),
        batch_sampler=shares,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=partial(_collate, seed),
        # Without one of its own it would draw from the global generator whenever a run starts, also when one
        # goes on.
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=partial(_outlive_signals, released),
    )
    try:
        for batch, uses, found in _reaching(batches, ahead, first):
            budget.spend(uses, found)
            if batch is None:
                raise UserError(
                    f"{uses} of {uses} examples cannot be used, the last {found[-1]}: no other could take its"
                    f" place, whatever unreadable_limit says; see {log or 'the data'}, mend it or its filters"
                )
            yield batch
    finally:
        released.set()


def _shards_of(source: Source) -> int:
    sizes = getattr(source, "shard_sizes", None)
    return 1 if sizes is None else len(sizes)


def _on_node(source: Source, node: Node, process: int, size: int, seed: int) -> tuple[Source, Ahead | None]:
    """A source as its machine reads it, and what fetches shards for the machine, in its first process."""
    if not hasattr(source, "on_node"):
        return source, None
    own: Any = source.on_node(node, seed)  # pyright: ignore[reportAttributeAccessIssue]
    return own, own.ahead(node, size, seed) if process == node.first else None


def _reaching(batches: Any, ahead: Ahead | None, first: int) -> Iterator[Any]:
    """The batches, while what is needed next is fetched."""
    # Workers are forked here, and threads are started only behind that.
    iterator = iter(batches)
    try:
        for number in count(first):
            if ahead is not None:
                ahead.reach(number)
            try:
                yield next(iterator)
            except StopIteration:
                return
    finally:
        if ahead is not None:
            ahead.close()


def _collate(seed: int, drawn: list[Drawn]) -> tuple[Batch | None, int, list[UnreadableExample]]:
    """A batch, or None where a place has no example; how many were tried, and what was wrong with them."""
    lost = next((one.faults for one in drawn if one.example is None), None)
    if lost is not None:
        return None, len(lost), list(lost)
    samples = [(one.position, one.chosen, one.example) for one in drawn if one.example is not None]
    faults = [fault for one in drawn for fault in one.faults]
    return make_batch(samples, seed), len(samples) + len(faults), faults


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
