"""Long prompts: token ids cut into chunks that the text encoder reads one by one, features joined again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .prompt import parse_emphasis

logger = logging.getLogger("bdm")


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
        """Positions of ``chunks`` joined chunks: 52, 102, 152, ... for Chinese CLIP."""
        return self.length + (chunks - 1) * self.content

    def split(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """Content ids -> at least one slice of at most ``content`` ids."""
        return [ids[i : i + self.content] for i in range(0, max(len(ids), 1), self.content)]

    def join(self, features: Tensor) -> Tensor:
        """(B, chunks, length, D) -> (B, joined_length, D); inner markers are dropped."""
        chunks = features.shape[1]
        head, tail = len(self.prefix), self.length - len(self.suffix)
        parts = [
            features[:, i, (head if i else 0) : (tail if i < chunks - 1 else self.length)]
            for i in range(chunks)
        ]
        return torch.cat(parts, dim=1)

    def lengthen(self, features: Tensor, empty: Tensor, positions: int) -> Tensor:
        """Joined features (L, D) of one text -> (positions, D), as if it had been joined with empty chunks
        behind it.

        Args:
            features: of the text alone.
            empty: (length, D) features of "".
            positions: a joined length of at least L.
        """
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


def tokenize(
    prompts: Sequence[str], tokenizer: Any, layout: ChunkLayout, normalize: Callable[[str], str] = str
) -> ChunkedTokens:
    """Tokenise prompts fragment by fragment and lay them out in chunks, all padded to the longest prompt's
    count.
    """
    rows = [content_ids(prompt, tokenizer, layout, normalize) for prompt in prompts]
    return lay_out([ids for ids, _ in rows], layout, [weights for _, weights in rows])


def content_ids(
    prompt: str,
    tokenizer: Any,
    layout: ChunkLayout,
    normalize: Callable[[str], str] = str,
    brackets: bool = True,
) -> tuple[list[int], list[float]]:
    """Token ids of a prompt without markers and padding, cut to what fits, and the emphasis of each.

    Without ``brackets`` these are text like any other, and nothing has emphasis.
    """
    ids, weights = _all_ids(prompt, tokenizer, normalize, brackets)
    room = layout.content * layout.limit
    if len(ids) > room:
        kept = tokenizer.decode(ids[max(0, room - 6) : room])
        logger.warning("prompt cut to %d of its %d tokens, after %r", room, len(ids), kept)
    return ids[:room], weights[:room]


def count_chunks(
    prompt: str,
    tokenizer: Any,
    layout: ChunkLayout,
    normalize: Callable[[str], str] = str,
    brackets: bool = True,
) -> int:
    """How many chunks a prompt takes."""
    ids, _ = _all_ids(prompt, tokenizer, normalize, brackets)
    return min(len(layout.split(ids)), layout.limit)


def _all_ids(
    prompt: str, tokenizer: Any, normalize: Callable[[str], str], brackets: bool
) -> tuple[list[int], list[float]]:
    refuse_half_characters(prompt)
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_emphasis(prompt) if brackets else [(prompt, 1.0)]:
        piece = tokenizer(normalize(text), add_special_tokens=False, verbose=False).input_ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


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


def lay_out(
    content: Sequence[Sequence[int]], layout: ChunkLayout, emphasis: Sequence[Sequence[float]] | None = None
) -> ChunkedTokens:
    """Content ids (see ``content_ids``) -> chunks, all padded to the longest one's count.

    Emphasis is 1 unless given.
    """
    pieces = [layout.split(ids) for ids in content]
    count = max(map(len, pieces))
    shape = (len(pieces), count, layout.length)
    all_ids, mask, weights = (
        torch.full(shape, layout.pad),
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape),
    )
    start = len(layout.prefix)
    for row, chunks in enumerate(pieces):
        for chunk in range(count):
            inner = list(chunks[chunk]) if chunk < len(chunks) else []
            full = [*layout.prefix, *inner, *layout.suffix]
            all_ids[row, chunk, : len(full)] = torch.tensor(full)
            mask[row, chunk, : len(full)] = True
            if inner and emphasis is not None:
                offset = chunk * layout.content
                weights[row, chunk, start : start + len(inner)] = torch.tensor(
                    emphasis[row][offset : offset + len(inner)]
                )
    return ChunkedTokens(all_ids, mask, weights)


def execution_device(module: nn.Module) -> torch.device:
    """Where a text encoder computes.

    Where its weights are, or where accelerate brings them for the time of a forward pass.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
