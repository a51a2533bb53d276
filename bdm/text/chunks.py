"""Long prompts: token ids cut into chunks that the text encoder reads one by one, features joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .rules import OFFICIAL, PromptRules

#: The ids of a chunk without markers and padding, and the weight of each.
Chunk = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class ChunkLayout:
    """How a tokenizer's chunks are laid out: ``prefix + content + suffix + padding``, always of one length.

    Attributes:
        prefix: marker ids in front ([CLS], ``<|startoftext|>``; none for T5).
        suffix: marker ids behind ([SEP], ``<|endoftext|>``, ``</s>``).
        pad: id that fills the rest.
        content: tokens of text in a chunk (Chinese CLIP 50, CLIP 75).
        limit: chunks at most; what is beyond is cut off with a warning.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    content: int
    limit: int

    @classmethod
    def of(cls, tokenizer: Any, content: int, limit: int) -> ChunkLayout:
        """The layout of a transformers tokenizer, read off what it puts around an empty text."""
        markers = tuple(tokenizer("").input_ids)
        return cls(markers[:-1], markers[-1:], tokenizer.pad_token_id, content, limit)

    @property
    def length(self) -> int:
        """Positions of one chunk."""
        return len(self.prefix) + self.content + len(self.suffix)

    def joined_length(self, chunks: int) -> int:
        """Positions of ``chunks`` joined chunks by the official rules: 52, 102, 152, ... for Chinese CLIP."""
        return self.length + (chunks - 1) * self.content

    def split(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """Content ids -> at least one slice of at most ``content`` ids."""
        return [ids[i : i + self.content] for i in range(0, max(len(ids), 1), self.content)]

    def join(self, features: Tensor, rules: PromptRules = OFFICIAL) -> Tensor:
        """(B, chunks, length, D) -> (B, joined_length, D); officially, inner markers are dropped."""
        if rules.chunks == "a1111":
            return features.flatten(1, 2)
        chunks = features.shape[1]
        head, tail = len(self.prefix), self.length - len(self.suffix)
        parts = [
            features[:, i, (head if i else 0) : (tail if i < chunks - 1 else self.length)]
            for i in range(chunks)
        ]
        return torch.cat(parts, dim=1)

    def lengthen(
        self, features: Tensor, empty: Tensor, positions: int, rules: PromptRules = OFFICIAL
    ) -> Tensor:
        """Joined features (L, D) of one text -> (positions, D), as if it had been joined with empty chunks
        behind it.

        Args:
            features: of the text alone.
            empty: (length, D) features of "".
            positions: a joined length of at least L.
            rules: those of ``join``.
        """
        if rules.chunks == "a1111":
            return torch.cat([features, *[empty] * ((positions - len(features)) // self.length)])
        head, tail = len(self.prefix), self.length - len(self.suffix)
        parts = [features]
        while (missing := positions - sum(map(len, parts))) > 0:
            # What was the end becomes an inner chunk and loses its marker.
            parts[-1] = parts[-1][: len(parts[-1]) - len(self.suffix)]
            parts.append(empty[head:])
            assert missing >= tail - head, f"{positions} positions are no joined length"
        return torch.cat(parts)


@dataclass(frozen=True)
class ChunkedTokens:
    """Tokenised prompts, all with the same number of chunks.

    Attributes:
        ids: (B, chunks, length) int64.
        mask: (B, chunks, length) bool, False on padding.
        weights: (B, chunks, length) float32 emphasis, 1 on markers and padding.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor


def refuse_half_characters(text: str) -> None:
    """Refuse a text with a lone surrogate, which no tokenizer and no file takes.

    Raises:
        UserError: names the text.
    """
    if half := next((character for character in text if "\ud800" <= character <= "\udfff"), None):
        raise UserError(
            f"the text {text[:60]!r} holds half a character (U+{ord(half):04X}), as where an emoji was cut in"
            " two; write it whole"
        )


def check_ids(ids: Tensor, model: Any) -> None:
    """Refuse tokens that a text encoder has no row for: its tokenizer is another model's.

    Raises:
        UserError: names both numbers.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and (largest := int(ids.max())) >= rows:
        raise UserError(
            f"the tokenizer gives token {largest} and the text encoder knows {rows}; use the tokenizer that"
            " belongs to it"
        )


def lay_out(content: Sequence[Sequence[int]], layout: ChunkLayout) -> ChunkedTokens:
    """Content ids (see ``bdm.text.splitting.content_ids``) -> chunks, cut where they are full.

    All are padded to the longest one's count, and weigh 1.
    """
    return lay_out_chunks([[(ids, ()) for ids in layout.split(row)] for row in content], layout)


def lay_out_chunks(rows: Sequence[Sequence[Chunk]], layout: ChunkLayout) -> ChunkedTokens:
    """The chunks of each prompt with their markers, all padded by empty ones to the longest one's count.

    Words weigh 1 where a chunk has no weights.
    """
    count = max(map(len, rows))
    shape = (len(rows), count, layout.length)
    all_ids, mask, all_weights = (
        torch.full(shape, layout.pad),
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape),
    )
    start = len(layout.prefix)
    for row, chunks in enumerate(rows):
        empty: Chunk = ((), ())
        for place, (ids, weights) in enumerate([*chunks, *[empty] * (count - len(chunks))]):
            full = [*layout.prefix, *ids, *layout.suffix]
            all_ids[row, place, : len(full)] = torch.tensor(full)
            mask[row, place, : len(full)] = True
            if weights:
                all_weights[row, place, start : start + len(ids)] = torch.tensor(weights)
    return ChunkedTokens(all_ids, mask, all_weights)


def weigh(features: Tensor, weights: Tensor) -> Tensor:
    """Features times the weights of their words; each chunk's mean is restored by one factor, as in A1111.

    Args:
        features: (B, chunks, length, D).
        weights: (B, chunks, length).
    """
    if (weights == 1).all():
        return features
    weighed = features.float() * weights.to(features.device)[..., None]
    dims = (2, 3)
    factor = features.float().mean(dims, keepdim=True) / weighed.mean(dims, keepdim=True)
    # Weights may cancel each other; then no factor brings the mean back.
    return (weighed * torch.where(factor.isfinite(), factor, 1.0)).to(features.dtype)


def execution_device(module: nn.Module) -> torch.device:
    """Where a text encoder computes.

    Where its weights are, or where accelerate brings them for the time of a forward pass.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
