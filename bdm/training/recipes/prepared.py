"""Prepared data and the models of a run: they must be those that prepared it."""

from __future__ import annotations

from typing import Any

from ...data.source import Source
from ...errors import UserError
from ...models.fingerprint import check_fingerprints, text_fingerprint, tokens_fingerprint, vae_fingerprint
from ...text.native import NativeTextEncoder


def check_prepared(
    source: Source,
    vae: tuple[Any, Any],
    native: tuple[Any, NativeTextEncoder] | None = None,
    trained: bool = False,
) -> None:
    """Refuse prepared data that was made with other models than this run's.

    Args:
        source: the data; what was not prepared passes.
        vae: what the VAE was loaded from, for the message, and the VAE.
        native: the same of the native text encoder, if there is one.
        trained: whether that is trained, so that its features change with every step and none can be
            prepared.

    Raises:
        UserError: see ``check_fingerprints``; features of texts for an encoder that is trained.
    """
    prepared = getattr(source, "fingerprints", None)
    if not prepared:
        return
    features = prepared.get("text_encoder")
    if trained and features:
        raise UserError(
            f"{getattr(source, 'origin', 'the data')} holds features of texts by {features['source']}"
            f" ({features['fingerprint'][:10]}), and this run trains its text encoder, whose features change"
            " with every step; prepare the data again with text: none, or text: ids"
        )
    own = {"vae": (vae[0], vae_fingerprint(vae[1]))}
    if native is not None:
        own["text_encoder"] = (native[0], text_fingerprint(native[1]))
        own["tokenizer"] = (native[0], tokens_fingerprint(native[1]))
    check_fingerprints(prepared, own, getattr(source, "origin", "the data"))
