"""Trigger words: what the tokenizer learns while rows for them stand in the text encoder's token table."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line
from ..text.english import loaded_tokens, trigger_tokens
from .stack import Place, WeightDelta, WeightStack


class TriggerWords:
    """The trigger words on a pipeline.

    Args:
        pipe: the pipeline, whose tokenizer learns them.
        weights: its weights, of which one is the token table.
    """

    def __init__(self, pipe: Any, weights: WeightStack) -> None:
        self._pipe, self._weights = pipe, weights
        self._pristine: Any = None  # the tokenizer without trigger words, while there are any
        self._built: tuple[Any, int] | None = None  # the one with them, and how many tokens it had
        self._counts: list[tuple[str, int]] = []  # which they are, and how many vectors each stands for

    def of(self, name: str) -> list[str]:
        """The words that a plug-in has brought."""
        return list(self._weights.deltas.get(name, WeightDelta()).words)

    def width(self) -> int:
        """Of the vectors that the text encoder takes.

        Raises:
            UserError: the pipeline lacks what trigger words need.
        """
        return self._table()[1].shape[1]

    def rows(self, vectors: Mapping[str, Tensor], bundle: Path | None = None) -> WeightDelta:
        """The delta that appends vectors to the token table.

        Args:
            vectors: by word, each (n, width).
            bundle: the adapter's file that names the words; None where the user has chosen the word.

        Raises:
            UserError: a word that cannot be, or is taken; the pipeline lacks what trigger words need.
        """
        place, table = self._table()
        self._check_tokenizer(len(table))
        taken: set[str] = set()
        for word, its in vectors.items():
            taken |= self._check_word(word, len(its), taken, bundle)
        rows = torch.cat(list(vectors.values()))
        return WeightDelta(rows={place: rows}, words={word: len(its) for word, its in vectors.items()})

    def put(self, name: str, delta: WeightDelta) -> None:
        """Add a delta, and teach the tokenizer its words; if that fails, nothing has changed.

        Raises:
            UserError: the delta does not fit, or the tokenizer refuses a word.
        """
        self._weights.put(name, delta)
        if not delta.words:
            return
        try:
            self._rebuild()
        except Exception as error:  # the tokenizer's library says little of what it refuses
            self.remove(name)
            words = ", ".join(map(repr, delta.words))
            raise UserError(
                f"the tokenizer refuses the trigger word {words} ({first_line(error)}); give another name"
            ) from None

    def remove(self, name: str) -> None:
        """Take a delta off, and its words from the tokenizer; nothing happens if there is none of that name.

        Raises:
            UserError: the token table, or the tokenizer, was changed by others; nothing has changed then.
        """
        delta = self._weights.deltas.get(name, WeightDelta())
        if delta.words:
            self._check_unchanged()
        self._weights.remove(name)
        self._rebuild()

    def _table(self) -> tuple[Place, Tensor]:
        """The token table's place, and what it is without trigger words."""
        base = self._weights.base("text_encoder")
        names = [name for name in base if name.endswith("token_embedding.weight")]
        if len(names) != 1:
            kind = type(self._pipe.text_encoder).__name__
            raise UserError(
                f"the text encoder is a {kind} without one token table that embeddings could be added to; use"
                " CLIP's"
            )
        return ("text_encoder", names[0]), base[names[0]]

    def _check_tokenizer(self, rows: int) -> None:
        pristine = self._pristine or getattr(self._pipe, "tokenizer", None)
        if pristine is None:
            raise UserError(
                "the pipeline has no tokenizer that could learn a trigger word; attach embeddings to a"
                " whole one"
            )
        self._check_unchanged()
        if len(pristine) != rows:
            raise UserError(
                f"the tokenizer has {len(pristine)} tokens and the text encoder {rows}; they must be equal"
            )

    def _check_unchanged(self) -> None:
        """Refuse a tokenizer that others exchanged, or taught words, since ours were put in it."""
        tokenizer: Any = getattr(self._pipe, "tokenizer", None)
        if self._built is None or tokenizer is self._pristine:
            return
        if tokenizer is not self._built[0] or len(tokenizer) != self._built[1]:
            raise UserError(
                "the pipeline's tokenizer was exchanged, or learnt other words, since embeddings were"
                " attached; undo that (such as by unload_textual_inversion(token)), then attach or detach"
            )

    def _check_word(self, word: str, vectors: int, taken: set[str], bundle: Path | None) -> set[str]:
        """The tokens of a word, lower-cased; refused if one of them is another's."""
        if bundle is None:
            what, remedy = f"the trigger word {word!r}", "attach the embedding under another name"
        else:
            what = f"{bundle} bundles an embedding for the trigger word {word!r}, which"
            remedy = "detach what has it, or give a file without it"
        if not word.strip() or re.search(r"[<>\ud800-\udfff]", word):
            raise UserError(f"{what} cannot be: it is empty or holds <, > or half a character; {remedy}")
        tokenizer = self._pipe.tokenizer
        tokens = {token.lower() for token in trigger_tokens(word, vectors)}
        known = {token.lower() for token in tokenizer.get_vocab()} | taken
        loaded = {other.lower() for other in loaded_tokens(tokenizer)}
        if known & tokens or word.lower() in loaded:
            raise UserError(f"{what} is taken; {remedy}")
        return tokens

    def _rebuild(self) -> None:
        """Give the pipeline a copy of its tokenizer that knows the trigger words.

        Its own again when there are none.
        """
        from tokenizers import AddedToken

        deltas = self._weights.deltas.values()
        counts = [item for delta in deltas for item in delta.words.items()]
        if counts == self._counts:
            return
        pipe = self._pipe
        # Assigned in this order, so that an interrupt leaves nothing that the next call does not mend.
        if self._pristine is None:
            self._pristine = pipe.tokenizer
        self._counts, tokenizer = [("", 0)], self._pristine
        if counts:
            tokenizer = copy.deepcopy(tokenizer)
        for word, count in counts:
            tokenizer.add_tokens(
                [AddedToken(token, normalized=False) for token in trigger_tokens(word, count)]
            )
        self._built, pipe.tokenizer = None, tokenizer
        if counts:
            self._built = (tokenizer, len(tokenizer))
        else:
            self._pristine = None
        self._counts = counts
