"""Textual-inversion embeddings (arXiv 2208.01618): vectors that a word stands for."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .identify import identify, require
from .kinds import MOST_VECTORS, is_vectors
from .weights import WeightFile, refuse_not_finite

#: How the keys of embeddings begin that lie in an adapter's file.
BUNDLED = "bundle_emb."
_VECTORS = re.compile(r"bundle_emb\.(?P<word>.+)\.(?:string_to_param\.[^.]+|emb_params|clip_l)")
#: What A1111 keeps beside an embedding's vectors.
_BESIDE_VECTORS = re.compile(r"\.(?:string_to_token\.[^.]+|step|sd_checkpoint|sd_checkpoint_name|name)$")
#: What A1111 keeps beside the vectors: the token that stood for them, counters.
_BESIDE = ("string_to_token.", "step", "epoch")


def embedding_vectors(file: WeightFile, width: int) -> Tensor:
    """The (n, width) vectors of an embedding file.

    Args:
        file: A1111's ``.pt`` (``string_to_param``) or ``.safetensors`` (``emb_params``), or diffusers' one
            tensor by token.
        width: of the text encoder's token embeddings (768 for SD1.5).

    Raises:
        UserError: not an embedding, made for another base, or NaN.
    """
    require(identify(file.tensors), ("embedding",), file.path)
    found = {key: t for key, t in file.tensors.items() if is_vectors(t)}
    if len(found) != 1:
        raise UserError(f"{file.path} holds {len(found)} embeddings; give a file with one")
    left = [key for key in file.tensors if key not in found and not key.startswith(_BESIDE)]
    if left:
        raise UserError(
            f"{file.path} holds {left[0][:120]!r} beside its embedding, and what that means is not known"
            " here; give a file without it"
        )
    (tensor,) = found.values()
    vectors = _as_rows(tensor, width, file.path)
    refuse_not_finite({"the embedding": vectors}, file.path)
    return vectors


def bundled_embeddings(file: WeightFile, width: int) -> dict[str, Tensor]:
    """The embeddings that a trainer has put in an adapter's file, (n, width) each, by their words.

    Args:
        file: the adapter's.
        width: of the text encoder's token embeddings.

    Raises:
        UserError: a form that is not known, one made for another base, or two for one word.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        if not key.startswith(BUNDLED) or _BESIDE_VECTORS.search(key):
            continue
        form = _VECTORS.fullmatch(key)
        if form is None or not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
            raise UserError(
                f"{file.path} bundles {key[:120]!r} of shape {tuple(tensor.shape)}, which is no embedding for"
                " SD1.5; give a file without it"
            )
        word = re.sub(r"^<(.+)>$", r"\1", form["word"])  # words are kept with or without their brackets
        if word in found:
            raise UserError(f"{file.path} bundles two embeddings for the word {word!r}; give a file with one")
        found[word] = _as_rows(tensor, width, file.path)
    return found


def _as_rows(tensor: Tensor, width: int, path: Path) -> Tensor:
    vectors = tensor.reshape(-1, tensor.shape[-1])
    if vectors.shape[1] != width or not 1 <= len(vectors) <= MOST_VECTORS:
        raise UserError(
            f"{path}: {vectors.shape[0]} vectors of width {vectors.shape[1]}; this encoder takes 1 to"
            f" {MOST_VECTORS} of width {width}: use an embedding made for this base"
        )
    return vectors
