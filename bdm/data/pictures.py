"""One raw sample -> one example.

Which samples are used, how their pictures are decoded and cut, which captions count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .captions import is_whole, texts_of, weighted_texts
from .decoding import opened, see, seen_size
from .source import Example, UnreadableExample, crop_to

#: Pictures of more pixels are refused before they are decoded (a decompression bomb is a few kilobytes).
MOST_PIXELS = 64_000_000


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """What the sources of raw pictures share.

    Attributes:
        size: side of the pictures; they are resized so that the shorter side fits and cropped to the centre
            square.
        captions: fields that hold captions, with the weight by which one is drawn.
        min_side: smaller pictures are unreadable examples.
        max_aspect: so are pictures whose sides differ by more than this factor; 0 allows any.
        min_scores: fields with the least value that is taken; lower ones are unreadable examples, as is a
            missing field.
        max_caption: captions are cut to so many characters; empty ones are unreadable examples.
        buckets: (width, height) of the aspect-ratio buckets (see ``bdm.data.buckets``); none cuts squares.
        flip: share of the uses in which a picture is mirrored.
        english: field that says in English what the captions say; samples without it have no such caption.
        background: colour behind pictures with transparent parts, as Pillow reads it ("white", "#808080").
    """

    size: int = 512
    captions: Mapping[str, float] = field(default_factory=lambda: {"txt": 1.0})
    min_side: int = 0
    max_aspect: float = 0.0
    min_scores: Mapping[str, float] = field(default_factory=dict)
    max_caption: int = 1000
    buckets: Sequence[tuple[int, int]] = ()
    flip: float = 0.0
    english: str | None = None
    background: str = "white"

    @classmethod
    def of(cls, default: Mapping[str, Any], given: Mapping[str, Any]) -> PictureRules:
        """The rules with a source's own defaults; None stands for a default."""
        return cls(**{**default, **{name: value for name, value in given.items() if value is not None}})

    @property
    def filters(self) -> bool:
        """Whether any rule leaves out samples for what they are, not for damage."""
        return bool(self.min_scores or self.min_side or self.max_aspect)

    @property
    def measured(self) -> bool:
        """Whether the sizes of the pictures decide anything."""
        return bool(self.buckets or self.min_side or self.max_aspect)

    def passing(self, scores: Mapping[str, np.ndarray], sizes: np.ndarray | None) -> np.ndarray:
        """(N,) bool: which samples the filters let pass.

        Args:
            scores: (N,) values of each field of ``min_scores``, NaN where there is none.
            sizes: (N, 2) width and height; samples whose size is unknown (0) pass.
        """
        kept = np.ones(len(next(iter(scores.values()), sizes if sizes is not None else ())), dtype=bool)
        for name, least in self.min_scores.items():
            kept &= scores[name] >= least
        if sizes is not None:
            short, long = sizes.min(1), sizes.max(1)
            fits = (short >= self.min_side) & (short * long <= MOST_PIXELS)
            if self.max_aspect:
                fits &= long <= self.max_aspect * short
            kept &= fits | (short == 0)
        return kept

    def example(self, key: str, facts: Mapping[str, Any], content: bytes | Path, bucket: int = 0) -> Example:
        """The example of a sample.

        Args:
            key: what messages call it.
            facts: its captions and scores.
            content: the picture file.
            bucket: number of its bucket, where there are buckets.

        Raises:
            UnreadableExample: a rule or a damaged picture speaks against it.
        """
        for name, least in self.min_scores.items():
            value = facts.get(name)
            if not score_of(value) >= least:
                raise UnreadableExample(key, f"{name} is {value}, below {least}", "score")
        texts, weights = zip(*self.captions_of(key, facts), strict=True)
        width, height = self.buckets[bucket] if self.buckets else (self.size, self.size)
        pixels = self.decode(key, content, width, height)
        return Example(
            texts[0],
            pixels,
            captions=texts,
            caption_weights=weights,
            flip=self.flip,
            english=self._english(facts),
        )

    def _english(self, facts: Mapping[str, Any]) -> str | None:
        texts = texts_of(facts.get(self.english)) if self.english else []
        return next((text[: self.max_caption] for text in texts if is_whole(text)), None)

    def captions_of(self, key: str, facts: Mapping[str, Any]) -> list[tuple[str, float]]:
        """The captions of a sample with their weights, at least one."""
        texts = weighted_texts(facts, self.captions)
        if not texts:
            has = ", ".join(sorted(map(str, facts))) or "nothing"
            raise UnreadableExample(key, f"no caption in {', '.join(self.captions)}; it has {has}", "caption")
        found = [(text[: self.max_caption], weight) for text, weight in texts if is_whole(text)]
        if not found:
            raise UnreadableExample(key, "its caption holds half of a character", "caption")
        return found

    def caption(self, key: str, facts: Mapping[str, Any]) -> str:
        """The heaviest caption of a sample."""
        return max(self.captions_of(key, facts), key=lambda pair: pair[1])[0]

    def decode(self, key: str, content: bytes | Path, width: int, height: int) -> Tensor:
        """(3, height, width) uint8: the picture resized until it covers that and cropped in the centre.

        Never padded.
        """
        try:
            with opened(content) as file:
                self._check_size(key, file.width, file.height)
                picture = crop_to(see(file, self.background), width, height)
        except UnreadableExample:
            raise
        except Exception as error:  # PIL's decoders raise almost anything on damaged files
            raise UnreadableExample(key, f"{type(error).__name__}: {error}") from None
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def fits(self, width: int, height: int) -> bool:
        """Whether a picture of this size is used."""
        short, long = sorted((width, height))
        fits = short >= max(1, self.min_side) and width * height <= MOST_PIXELS
        return fits and not (self.max_aspect and long > self.max_aspect * short)

    def _check_size(self, key: str, width: int, height: int) -> None:
        if width * height > MOST_PIXELS:
            raise UnreadableExample(key, f"{width}x{height} is more than {MOST_PIXELS:,} pixels", "size")
        if not self.fits(width, height):
            raise UnreadableExample(key, f"{width}x{height} is outside min_side or max_aspect", "size")


def score_of(value: Any) -> float:
    """A score as a number, NaN for whatever is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else float("nan")


def picture_size(file: Any) -> tuple[int, int]:
    """Width and height of a picture as it is seen (EXIF may turn it), from its header, without decoding it.

    (0, 0) where there is none to be read.
    """
    try:
        with opened(file) as picture:
            return seen_size(picture)
    except Exception:  # as above; the sample itself says later what is wrong with it
        return 0, 0
