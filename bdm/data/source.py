"""What every data source gives: pictures with captions, by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
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
        prepared_text: what was prepared for each caption, or nothing: (L, D) text features, or (n,) integer
            token ids.
        flip: share of the uses in which the picture is mirrored.
        english: what the caption says in English, for a backbone that draws the same for it; None where
            nobody has said, or the English world draws it otherwise.
        bilingual: the picture in two languages at once, a native text and an English one that says the rest;
            None where there is no such pair.
    """

    caption: str
    pixels: Tensor | None = None
    moments: Tensor | None = None
    captions: tuple[str, ...] = ()
    caption_weights: tuple[float, ...] = ()
    prepared_text: tuple[Tensor, ...] = ()
    flip: float = 0.0
    english: str | None = None
    bilingual: tuple[str, str] | None = None


class UnreadableExample(UserError):
    """An example that cannot be used; in training another takes its place.

    Attributes:
        key: what the example is called.
        reason: why not.
        kind: what speaks against it, in a word: "unreadable" for damage, else the filter ("score", "size",
            "caption").
    """

    def __init__(self, key: str, reason: str, kind: str = "unreadable") -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason, self.kind = key, reason, kind

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.key, self.reason, self.kind)


class Source(Protocol):
    """A finite, indexable set of examples. Index ``i`` always gives the same example.

    A source may also have ``shard_sizes`` (samples of each of its shards: neighbours are kept together, see
    ``draw_indices``), ``bucket_of`` ((N,) number of each example's bucket: every batch is of one, see
    ``bdm.data.buckets``), ``key(index)`` (what messages call an example), ``captions(index)`` (all of its
    captions, without its picture) and ``fingerprints`` (of the models
    that prepared it, see ``bdm.models.fingerprint``). Large ones have an order of their own (``order``), say
    who may stand for whom (``neighbours``, ``alike``), what they are (``corpus``, ``changes_since``) and how
    a machine reads them (``on_node``, ``ahead``): see ``bdm.data.indexed.IndexedSource``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def caption(self, index: int) -> str:
        """The caption of example ``index``, without reading its picture."""
        ...

    @property
    def validation(self) -> Source:
        """Examples that training never sees, for the validation loss."""
        ...


def alike(source: Source) -> Sequence[int] | np.ndarray:
    """The examples that may stand in one batch: what the filters let pass, of the fullest bucket."""
    if hasattr(source, "alike"):
        return source.alike()  # pyright: ignore[reportAttributeAccessIssue]
    kept, buckets = getattr(source, "kept", None), getattr(source, "bucket_of", None)
    if kept is None and buckets is None:
        return range(len(source))
    members = np.arange(len(source)) if kept is None else np.flatnonzero(kept)
    if buckets is None or not len(members):
        return members
    own = buckets[members]
    return members[own == np.bincount(own).argmax()]


def example_or_reason(source: Source, index: int) -> Example | UnreadableExample:
    """An example, or why it cannot be used."""
    try:
        return source[index]
    except UnreadableExample as error:
        return error


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels in [0, 255] -> float32 in [-1, 1], the range an SD1.5 VAE expects."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(pictures: Tensor) -> Tensor:
    """Float pictures in [-1, 1] -> uint8 in [0, 255]; values outside are clamped."""
    return ((pictures.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def crop_to(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize a picture so that it just covers ``width`` x ``height`` and crop the centre; never padded."""
    scale = max(width / picture.width, height / picture.height)
    covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(covering, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
