"""Embeddings (textual inversion): rows of the text encoder's token table, and a word that stands for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats.embedding import embedding_vectors
from ..formats.weights import read_weights
from .kind import PluginKind
from .stack import WeightDelta


class EmbeddingKind(PluginKind):
    """An embedding's vectors are appended to the token table; its name is the trigger word."""

    kind = "embedding"
    sources = ("embedding",)

    def attach(self, path: Path, name: str) -> None:
        """Append an embedding's vectors to the token table (see ``PluginKind.attach``)."""
        if self.to.without_english:
            unet: Any = self.to.part("unet")
            width = unet.config["cross_attention_dim"]
            count = len(embedding_vectors(read_weights(path), width))
            self.to.leave_out(f"an embedding of {count} vectors is", path)
            self.to.words.put(name, WeightDelta())
            return
        vectors = embedding_vectors(read_weights(path), self.to.words.width())
        self.to.words.put(name, self.to.words.rows({name: vectors}))

    def detach(self, name: str) -> None:
        """Take an embedding's vectors out of the token table, and its word from the tokenizer."""
        self.to.words.remove(name)
