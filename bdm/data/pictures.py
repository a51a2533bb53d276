"""One raw sample -> one example.

Which samples are used, how their pictures are decoded and cut, which captions count.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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

    @classmethod
    def of(cls, default: Mapping[str, Any], given: Mapping[str, Any]) -> PictureRules:
        """The rules with a source's own defaults; None stands for a default."""
        return cls(**{**default, **{name: value for name, value in given.items() if value is not None}})

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
            if not isinstance(value, int | float) or not value >= least:
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
        text = facts.get(self.english) if self.english else None
        return text.strip()[: self.max_caption] if isinstance(text, str) and is_whole(text) else None

    def captions_of(self, key: str, facts: Mapping[str, Any]) -> list[tuple[str, float]]:
        """The captions of a sample with their weights, at least one."""
        given = [(facts.get(name), weight) for name, weight in self.captions.items()]
        texts = [(text.strip(), weight) for text, weight in given if isinstance(text, str) and text.strip()]
        if not texts:
            has = ", ".join(sorted(facts)) or "nothing"
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
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise UnreadableExample(
                        key, f"{file.width}x{file.height} is more than {MOST_PIXELS:,} pixels", "size"
                    )
                short, long = sorted(file.size)
                if short < max(1, self.min_side) or (self.max_aspect and long > self.max_aspect * short):
                    raise UnreadableExample(
                        key, f"{file.width}x{file.height} is outside min_side or max_aspect", "size"
                    )
                picture = crop_to(file.convert("RGB"), width, height)
        except UnreadableExample:
            raise
        except Exception as error:  # PIL's decoders raise almost anything on damaged files
            raise UnreadableExample(key, f"{type(error).__name__}: {error}") from None
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def is_whole(text: str) -> bool:
    """Whether no character was cut in two: JSON can hold half of an emoji (of a surrogate pair)."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def picture_size(file: Any) -> tuple[int, int]:
    """Width and height in a picture file's header, without decoding it.

    (0, 0) where there is none to be read.
    """
    try:
        with Image.open(file) as picture:
            return picture.size
    except Exception:  # as above; the sample itself says later what is wrong with it
        return 0, 0
