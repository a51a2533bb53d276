"""What a denoiser is told: captions of a batch -> text features."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...data.batch import Batch
from ...data.source import Source
from ...text.english import encode_english
from ...text.native import NativeTextEncoder


class Captions(Protocol):
    """The texts of a network, and how they are encoded.

    Attributes:
        dropped: what a caption becomes when it is dropped.
    """

    dropped: str

    def of(self, batch: Batch) -> Sequence[Any]:
        """The B texts of a batch, before some are dropped: captions, or what was prepared for them."""
        ...

    def encode(self, texts: Sequence[Any]) -> Tensor:
        """(B, L, D) features of B texts."""
        ...


class EnglishCaptions:
    """The English captions that a backbone is told.

    Args:
        text_encoder: the backbone's.
        tokenizer: likewise.
        trigger: word appended to every caption (", word"); "" for none. A dropped caption keeps it, so that
            the word alone means the style and nothing of any content, as it must where another language says
            what to draw.
    """

    def __init__(self, text_encoder: Any, tokenizer: Any, trigger: str = "") -> None:
        self.text_encoder, self.tokenizer, self.dropped = text_encoder, tokenizer, trigger

    def of(self, batch: Batch) -> list[str]:
        return self.with_trigger(batch.captions)

    def with_trigger(self, texts: Sequence[str]) -> list[str]:
        """Texts with the trigger behind each."""
        return [f"{text}, {self.dropped}" if self.dropped else text for text in texts]

    def encode(self, texts: Sequence[str]) -> Tensor:
        return encode_english(texts, self.text_encoder, self.tokenizer)


class NativeCaptions:
    """The native captions that a network is told.

    Args:
        encoder: of the native language.
        shuffled: the source whose captions pictures get from each other (a control that must not learn); None
            gives them their own.
        seed: who gets whose.
    """

    dropped = ""

    def __init__(self, encoder: NativeTextEncoder, shuffled: Source | None = None, seed: int = 0) -> None:
        self._encoder, self._source = encoder, shuffled
        count = len(shuffled) if shuffled is not None else 0
        self._others = random.Random(seed).sample(range(count), count)

    def of(self, batch: Batch) -> Sequence[str | Tensor]:
        if self._source is None:
            return batch.text_inputs
        return [self._source.caption(self._others[i]) for i in batch.indices]

    def with_trigger(self, texts: Sequence[str]) -> list[str]:
        """The texts as they are: words of plug-ins are English."""
        return [*texts]

    def encode(self, texts: Sequence[str | Tensor]) -> Tensor:
        return self._encoder.encode(texts)


class TextFeatures:
    """Features of texts, each encoded once where they may be kept.

    Those that a trained encoder makes change with every step and are never kept.

    Args:
        encode: B texts -> (B, L, D).
        keep: keep them in memory.
    """

    def __init__(self, encode: Callable[[Sequence[Any]], Tensor], keep: bool) -> None:
        self.encode, self.keep = encode, keep
        self.kept: dict[Any, Tensor] = {}

    def __call__(self, texts: Sequence[Any]) -> Tensor:
        """(B, L, D) features of B texts."""
        if not self._may_keep():
            return self.encode(texts)
        for text in set(texts) - self.kept.keys():
            # Alone, so that its features do not depend on when it is met, and a resumed run sees the same.
            self.kept[text] = self.encode([text])[0]
        rows = [self.kept[text] for text in texts]
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else self.encode(texts)

    def _may_keep(self) -> bool:
        if self.keep and not self.kept:
            with torch.enable_grad():
                self.keep = not self.encode([""]).requires_grad
        return self.keep
