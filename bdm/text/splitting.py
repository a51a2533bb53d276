"""Prompts -> token ids in chunks, with the weight of each token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .chunks import Chunk, ChunkedTokens, ChunkLayout, lay_out_chunks, refuse_half_characters
from .prompt import is_break, parse_emphasis
from .rules import A1111, OFFICIAL, PromptRules

logger = logging.getLogger("bdm")

#: A chunk that is full ends behind its last comma, if no more than so many tokens stand from there on.
BACKTRACK = 20


@dataclass(frozen=True)
class Reading:
    """How one language's prompts are read.

    Attributes:
        rules: of both languages.
        native: full-width brackets and Chinese commas count, and weights only where the rules say so.
        joined: ids of tokens that must not begin a chunk: an embedding's vectors behind its first.
        brackets: a native text encoder's brackets are taken away where they weigh nothing; False: they are
            text then.
    """

    rules: PromptRules = A1111
    native: bool = False
    joined: Collection[int] = ()
    brackets: bool = True

    @property
    def commas(self) -> str:
        """The commas behind which a chunk may end."""
        return ",，、。" if self.native else ","

    def runs(self, prompt: str) -> list[tuple[str, float]]:
        """The words of a prompt with their weights (see ``parse_emphasis``)."""
        full_width = self.native and self.rules.weighs_native
        if self.native and not full_width and not self.brackets:
            return [(prompt, 1.0)]
        runs = parse_emphasis(prompt, full_width, breaks=self.rules.chunks == "a1111")
        if not self.native or self.rules.weighs_native:
            return runs
        return [(text, -1.0 if is_break(text, weight) else 1.0) for text, weight in runs]


def tokenize(
    prompts: Sequence[str],
    tokenizer: Any,
    layout: ChunkLayout,
    normalize: Callable[[str], str] = str,
    reading: Reading = Reading(),
) -> ChunkedTokens:
    """Tokenise prompts and lay them out in chunks, all padded to the longest prompt's count."""
    return lay_out_chunks(
        [split_prompt(prompt, tokenizer, layout, normalize, reading) for prompt in prompts], layout
    )


def split_prompt(
    prompt: str, tokenizer: Any, layout: ChunkLayout, normalize: Callable[[str], str], reading: Reading
) -> list[Chunk]:
    """The chunks of a prompt, one at least.

    Raises:
        UserError: the prompt holds half a character.
    """
    refuse_half_characters(prompt)
    runs = reading.runs(prompt)
    pieces = [_ids_of(text, tokenizer, normalize) for text, _ in runs]
    if reading.rules.chunks == "official":
        ids = [token for piece in pieces for token in piece]
        weights = [w for piece, (_, w) in zip(pieces, runs, strict=True) for _ in piece]
        kept = _cut(ids, tokenizer, layout)
        slices = [slice(i, i + layout.content) for i in range(0, max(1, len(kept)), layout.content)]
        return [(kept[part], weights[: len(kept)][part]) for part in slices]
    filling = _Filling(layout.content, comma_ids(tokenizer, reading.commas))
    for piece, (text, weight) in zip(pieces, runs, strict=True):
        if is_break(text, weight):
            filling.end_chunk()
            continue
        for unit in _units(piece, reading.joined):
            filling.add(unit, weight)
    return filling.chunks()


def content_ids(
    prompt: str,
    tokenizer: Any,
    layout: ChunkLayout,
    normalize: Callable[[str], str] = str,
    reading: Reading = Reading(OFFICIAL, native=True),
) -> list[int]:
    """A prompt's ids by the official rules, without markers, padding and weights, cut to what fits."""
    refuse_half_characters(prompt)
    ids: list[int] = []
    for text, _ in reading.runs(prompt):
        ids += _ids_of(text, tokenizer, normalize)
    return _cut(ids, tokenizer, layout)


def count_chunks(
    prompt: str,
    tokenizer: Any,
    layout: ChunkLayout,
    normalize: Callable[[str], str] = str,
    reading: Reading = Reading(OFFICIAL),
) -> int:
    """How many chunks a prompt takes."""
    return len(split_prompt(prompt, tokenizer, layout, normalize, reading))


def comma_ids(tokenizer: Any, commas: str) -> set[int]:
    """The tokens that are commas; CLIP's vocabulary has further ones that its texts do not come to."""
    unknown = (None, tokenizer.unk_token_id)
    found: set[int] = set()
    for comma in commas:
        end, *either = tokenizer.convert_tokens_to_ids([f"{comma}</w>", comma, f"▁{comma}"])
        found.update(token for token in (either if end in unknown else [end]) if token not in unknown)
    return found


def _ids_of(text: str, tokenizer: Any, normalize: Callable[[str], str]) -> list[int]:
    return tokenizer(normalize(text), add_special_tokens=False, verbose=False).input_ids


def _cut(ids: list[int], tokenizer: Any, layout: ChunkLayout) -> list[int]:
    room = layout.content * layout.limit
    if len(ids) > room:
        kept = tokenizer.decode(ids[max(0, room - 6) : room])
        logger.warning("prompt cut to %d of its %d tokens, after %r", room, len(ids), kept)
    return ids[:room]


def _units(ids: Sequence[int], joined: Collection[int]) -> list[list[int]]:
    """Tokens, those of one embedding together."""
    units: list[list[int]] = []
    for token in ids:
        if units and token in joined:
            units[-1].append(token)
        else:
            units.append([token])
    return units


class _Filling:
    """Fills chunks token by token, as A1111 does.

    Args:
        room: tokens of a chunk.
        commas: the tokens behind which a full chunk may be cut.
    """

    def __init__(self, room: int, commas: set[int]) -> None:
        self._room, self._commas = room, commas
        self._done: list[Chunk] = []
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._comma: int | None = None

    def add(self, unit: list[int], weight: float) -> None:
        """A token, or the vectors of one embedding, which stay together where they can."""
        full = len(self._ids) == self._room
        if full and unit[0] not in self._commas:
            self._move_what_follows_the_comma()
        if len(self._ids) == self._room or len(self._ids) + len(unit) > self._room >= len(unit):
            self.end_chunk()
        for token in unit:
            if len(self._ids) == self._room:
                self.end_chunk()
            self._comma = len(self._ids) if token in self._commas and not full else self._comma
            self._ids.append(token)
            self._weights.append(weight)

    def end_chunk(self) -> None:
        """Begin a new one."""
        self._done.append((self._ids, self._weights))
        self._ids, self._weights, self._comma = [], [], None

    def chunks(self) -> list[Chunk]:
        """All of them, one at least."""
        if self._ids or not self._done:
            self.end_chunk()
        return self._done

    def _move_what_follows_the_comma(self) -> None:
        if self._comma is None or self._room - self._comma > BACKTRACK:
            return
        cut = self._comma + 1
        moved = self._ids[cut:], self._weights[cut:]
        self._ids, self._weights = self._ids[:cut], self._weights[:cut]
        self.end_chunk()
        self._ids, self._weights = moved
