"""Prepared data and the models of a run: they must be those that prepared it."""

from __future__ import annotations

from typing import Any

from ...data.source import Source
from ...models.fingerprint import check_fingerprints, text_fingerprint, tokens_fingerprint, vae_fingerprint
from ...text.native import NativeTextEncoder


def check_prepared(
    source: Source, vae: tuple[Any, Any], native: tuple[Any, NativeTextEncoder] | None = None
) -> None:
    """Refuse prepared data that was made with other models than this run's.

    Args:
        source: the data; what was not prepared passes.
        vae: what the VAE was loaded from, for the message, and the VAE.
        native: the same of the native text encoder, if there is one.

    Raises:
        UserError: see ``check_fingerprints``.
    """
    prepared = getattr(source, "fingerprints", None)
    if not prepared:
        return
    own = {"vae": (vae[0], vae_fingerprint(vae[1]))}
    if native is not None:
        own["text_encoder"] = (native[0], text_fingerprint(native[1]))
        own["tokenizer"] = (native[0], tokens_fingerprint(native[1]))
    check_fingerprints(prepared, own, getattr(source, "origin", "the data"))
