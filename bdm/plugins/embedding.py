"""Embeddings (textual inversion): rows of the text encoder's token table, and a word that stands for them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..formats.embedding import embedding_vectors
from ..formats.weights import read_weights
from ..text.english import trigger_tokens
from .attachments import Attachments
from .kind import PluginKind
from .stack import Place, WeightDelta


class EmbeddingKind(PluginKind):
    """An embedding's vectors are appended to the token table; its name is the trigger word."""

    kind = "embedding"
    sources = ("embedding",)

    def __init__(self, to: Attachments) -> None:
        super().__init__(to)
        self._pristine: Any = None  # the tokenizer without trigger words, while there are any

    def attach(self, path: Path, name: str) -> None:
        """Append an embedding's vectors to the token table (see ``PluginKind.attach``)."""
        place = self._place()
        table = self.to.weights.base("text_encoder")[place[1]]
        vectors = embedding_vectors(read_weights(path), table.shape[1])
        self._check_tokenizer(len(table))
        self._check_word(name, len(vectors))
        self._append(name, vectors, place)

    def detach(self, name: str) -> None:
        """Take an embedding's vectors out of the token table, and its word from the tokenizer."""
        self.to.weights.remove(name)
        self._rebuild_tokenizer()

    def _append(self, name: str, vectors: Tensor, place: Place) -> None:
        self.to.weights.put(name, WeightDelta(rows={place: vectors.clone()}))
        try:
            self._rebuild_tokenizer()
        except Exception as error:  # the tokenizer's library says little of what it refuses
            self.to.weights.remove(name)
            raise UserError(
                f"the tokenizer refuses the trigger word {name!r} ({error}); give another name"
            ) from None

    def _check_tokenizer(self, rows: int) -> None:
        pristine = self._pristine or getattr(self.to.pipe, "tokenizer", None)
        if pristine is None:
            raise UserError(
                "the pipeline has no tokenizer that could learn a trigger word; attach embeddings to a"
                " whole one"
            )
        if len(pristine) != rows:
            raise UserError(
                f"the tokenizer has {len(pristine)} tokens and the text encoder {rows}; they must be equal"
            )

    def _check_word(self, name: str, vectors: int) -> None:
        if not name.strip() or re.search(r"[<>\ud800-\udfff]", name):
            raise UserError(
                f"{name!r} cannot be a trigger word; attach the embedding under a name without < and >"
            )
        known = {token.lower() for token in self.to.pipe.tokenizer.get_vocab()}
        if known & {token.lower() for token in trigger_tokens(name, vectors)}:
            raise UserError(f"the trigger word {name!r} is taken; attach the embedding under another name")

    def _triggers(self) -> dict[str, int]:
        """Trigger word -> number of vectors, in the order of their rows."""
        place = self._place()
        deltas = self.to.weights.deltas.items()
        return {name: len(delta.rows[place]) for name, delta in deltas if place in delta.rows}

    def _place(self) -> Place:
        encoder: Any = self.to.part("text_encoder")
        table = encoder.get_input_embeddings().weight
        return "text_encoder", next(name for name, p in encoder.named_parameters() if p is table)

    def _rebuild_tokenizer(self) -> None:
        """Give the pipeline a copy of its tokenizer that knows the trigger words.

        Its own again when there are none.
        """
        from tokenizers import AddedToken

        if self._pristine is None:
            self._pristine = self.to.pipe.tokenizer
        triggers = self._triggers()
        tokenizer = copy.deepcopy(self._pristine) if triggers else self._pristine
        for name, count in triggers.items():
            tokenizer.add_tokens(
                [AddedToken(token, normalized=False) for token in trigger_tokens(name, count)]
            )
        self.to.pipe.tokenizer = tokenizer
        if not triggers:
            self._pristine = None
