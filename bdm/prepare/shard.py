"""One prepared shard: a pure function of the samples, the models and the settings, whoever runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.source import Example, Source, UnreadableExample, example_or_reason, to_unit_range
from ..errors import UserError
from ..models.backbone import encode_moments
from ..models.caption_score import CaptionScorer
from ..text.native import NativeTextEncoder
from .hashing import perceptual_hash
from .writer import ShardWriter

#: Samples with these shares of damage do not end the work yet.
AT_LEAST = 200


@dataclass(frozen=True)
class Encoders:
    """The frozen models that prepare, on one device.

    ``autocast`` is the precision they compute in, None for float32.
    """

    vae: Any
    native: NativeTextEncoder | None = None
    scorer: CaptionScorer | None = None
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def precision(self) -> Any:
        """The context to compute in."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides a shard's content beside the models.

    Attributes:
        text: what is kept of a caption: its features, its token ids, or nothing but itself.
        dtype: of moments and features on disk.
        min_score: samples of a lower score are left out.
        buckets: (width, height) of the buckets; none for squares.
        batch_size: samples that are encoded together.
        workers: reading processes.
        unreadable_limit: share of samples damaged or without caption above which the work ends.
    """

    text: Literal["features", "ids", "none"] = "features"
    dtype: torch.dtype = torch.float16
    min_score: float | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    batch_size: int = 32
    workers: int = 0
    unreadable_limit: float = 0.05


@dataclass(frozen=True)
class _Sample:
    """A sample on its way: number in the source, example, score."""

    index: int
    example: Example
    score: float | None = None


def prepare_shard(
    source: Source,
    indices: range,
    path: Path,
    encoders: Encoders,
    settings: ShardSettings,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Prepare samples and publish them as one shard.

    Args:
        source: raw pictures.
        indices: of the samples.
        path: of the tar file.
        encoders: the models.
        settings: see there.
        progress: is told how many samples were dealt with.

    Returns:
        The shard's table: ``left_out`` by reason, ``unusable`` [key, reason] pairs, ``seen_scores`` of all
        samples, and of the kept ones in their order ``buckets``, ``scores``, ``hashes``.

    Raises:
        UserError: the disk is full or too many samples are damaged; nothing is left of the shard then.
    """
    table = _Table()

    def usable() -> Iterator[_Sample]:
        for index, found in read_examples(source, indices, settings.workers):
            progress(1)
            if isinstance(found, Example):
                yield _Sample(index, found)
            else:
                table.leave_out(found.kind, found.key, found.reason)

    with ShardWriter(path) as writer:
        for group in group_by_shape(usable(), settings.batch_size):
            chosen = table.choose(_score(group, encoders), settings.min_score)
            for sample, tensors in _encode(chosen, encoders, settings):
                if all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
                    table.keep(sample, settings.buckets)
                    writer.add(f"{sample.index:09d}", tensors, _facts(source, sample))
                else:
                    table.leave_out(
                        "not finite", _key(source, sample.index), "moments or features are not finite"
                    )
        table.check(len(indices), settings.unreadable_limit)
        return writer.publish(table.content())


class _Table:
    """What is noted of a shard's samples while it is written."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.unusable: list[tuple[str, str]] = []
        self.seen: list[float] = []
        self.kept: dict[str, list[Any]] = {"buckets": [], "scores": [], "hashes": []}

    def leave_out(self, kind: str, key: str, reason: str) -> None:
        """Note a sample that cannot be used, by name."""
        self.left_out[kind] += 1
        self.unusable.append((key, reason))

    def choose(self, samples: list[_Sample], min_score: float | None) -> list[_Sample]:
        """Note the scores and give the samples that pass."""
        self.seen += [s.score for s in samples if s.score is not None and isfinite(s.score)]
        chosen = [s for s in samples if min_score is None or (s.score is not None and s.score >= min_score)]
        self.left_out["min_score"] += len(samples) - len(chosen)
        return chosen

    def keep(self, sample: _Sample, buckets: tuple[tuple[int, int], ...]) -> None:
        """Note a sample that is written."""
        pixels = sample.example.pixels
        assert pixels is not None
        self.kept["buckets"].append(buckets.index((pixels.shape[2], pixels.shape[1])) if buckets else 0)
        self.kept["scores"].append(sample.score)
        self.kept["hashes"].append(perceptual_hash(pixels))

    def check(self, count: int, limit: float) -> None:
        """Raise a ``UserError`` if too many of ``count`` samples were of no use."""
        # Scores and sizes are meant to leave out many; damage and captions in another field are mistakes.
        bad = sum(self.left_out[kind] for kind in ("unreadable", "read", "not finite", "caption"))
        if bad > limit * max(count, AT_LEAST):
            key, reason = self.unusable[-1]
            raise UserError(
                f"{bad} of {count} samples cannot be used, the last {key} ({reason}); allowed is a share of"
                f" {limit:g} (unreadable_limit): mend the data, or raise it"
            )

    def content(self) -> dict[str, Any]:
        """As JSON."""
        reasons = {name: count for name, count in sorted(self.left_out.items()) if count}
        return {"left_out": reasons, "unusable": self.unusable, "seen_scores": self.seen, **self.kept}


class _Reader(Dataset):
    """Examples, or why there is none."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> tuple[int, Example | UnreadableExample]:
        return index, example_or_reason(self.source, index)


def read_examples(
    source: Source, indices: range, workers: int = 0
) -> Iterator[tuple[int, Example | UnreadableExample]]:
    """The examples of these indices in their order; for one that cannot be used, why not."""
    # Without a generator of its own it would draw from the global one.
    generator = torch.Generator().manual_seed(0)
    loader: Any = DataLoader(
        _Reader(source),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=lambda found: found,
        generator=generator,
    )
    return iter(loader)


def group_by_shape(samples: Iterator[_Sample], size: int) -> Iterator[list[_Sample]]:
    """Groups of up to ``size`` samples whose pictures have one shape, in an order that depends on the samples
    alone.
    """
    waiting: dict[tuple[int, ...], list[_Sample]] = {}
    for sample in samples:
        assert sample.example.pixels is not None
        shape = tuple(sample.example.pixels.shape)
        waiting.setdefault(shape, []).append(sample)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
    for shape in sorted(waiting):
        yield waiting[shape]


def _stack(samples: Sequence[_Sample]) -> Tensor:
    return torch.stack([s.example.pixels for s in samples if s.example.pixels is not None])


def _captions(example: Example) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """All captions of an example with their weights; sources of one caption give it alone."""
    return (example.captions, example.caption_weights) if example.captions else ((example.caption,), (1.0,))


@torch.no_grad()
def _score(samples: list[_Sample], encoders: Encoders) -> list[_Sample]:
    """The samples with the score of their heaviest caption."""
    if encoders.scorer is None:
        return samples
    heaviest = [
        max(zip(*reversed(_captions(s.example)), strict=True), key=lambda pair: pair[0])[1] for s in samples
    ]
    with encoders.precision():
        scores = encoders.scorer(_stack(samples), heaviest).tolist()
    return [_Sample(s.index, s.example, round(score, 4)) for s, score in zip(samples, scores, strict=True)]


@torch.no_grad()
def _encode(
    samples: list[_Sample], encoders: Encoders, settings: ShardSettings
) -> Iterator[tuple[_Sample, dict[str, Tensor]]]:
    """The tensors of each sample: ``moments`` and, for caption number i, ``text.i``."""
    if not samples:
        return
    with encoders.precision():
        moments = encode_moments(encoders.vae, to_unit_range(_stack(samples).to(encoders.device)))
        texts = _encode_texts(
            [caption for s in samples for caption in _captions(s.example)[0]], encoders, settings
        )
    start = 0
    for sample, own in zip(samples, moments.to("cpu", settings.dtype), strict=True):
        count = len(_captions(sample.example)[0])
        yield (
            sample,
            {"moments": own, **{f"text.{i}": text for i, text in enumerate(texts[start : start + count])}},
        )
        start += count


def _encode_texts(captions: list[str], encoders: Encoders, settings: ShardSettings) -> list[Tensor]:
    if settings.text == "none" or encoders.native is None:
        return []
    if settings.text == "ids":
        return [torch.tensor(encoders.native.token_ids(caption), dtype=torch.int32) for caption in captions]
    return [features.to("cpu", settings.dtype) for features in encoders.native.encode_each(captions)]


def _key(source: Source, index: int) -> str:
    key: Any = getattr(source, "key", None)
    return key(index) if key else str(index)


def _facts(source: Source, sample: _Sample) -> dict[str, Any]:
    captions, weights = _captions(sample.example)
    return {
        "key": _key(source, sample.index),
        "captions": captions,
        "weights": weights,
        "score": sample.score,
        **({"english": sample.example.english} if sample.example.english is not None else {}),
    }
