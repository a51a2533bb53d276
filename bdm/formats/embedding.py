"""Textual-inversion embeddings (arXiv 2208.01618): vectors that a word stands for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import UserError, printable
from .identify import identify, require
from .kinds import MOST_VECTORS, is_vectors
from .weights import WeightFile, refuse_not_finite

#: What A1111 keeps beside the vectors: the token that stood for them, counters.
_BESIDE = ("string_to_token.", "step", "epoch")


def embedding_vectors(file: WeightFile, width: int) -> Tensor:
    """The (n, width) vectors of an embedding file.

    Args:
        file: A1111's ``.pt`` (``string_to_param``) or ``.safetensors`` (``emb_params``), or diffusers' one
            tensor by token.
        width: of the text encoder's token embeddings (768 for SD1.5).

    Raises:
        UserError: not an embedding, made for another base, NaN, or with something in it whose meaning is not
            known.
    """
    require(identify(file.tensors), ("embedding",), file.path)
    found = {key: t for key, t in file.tensors.items() if is_vectors(t)}
    if len(found) != 1:
        raise UserError(f"{file.path} holds {len(found)} embeddings; give a file with one")
    left = [key for key in file.tensors if key not in found and not key.startswith(_BESIDE)]
    if left:
        raise UserError(
            f"{file.path} holds {printable(left[0], 120)!r} beside its embedding, and what that means is not"
            " known here; give a file without it"
        )
    (tensor,) = found.values()
    vectors = as_rows(tensor, width, file.path)
    refuse_not_finite({"the embedding": vectors}, file.path)
    return vectors


def as_rows(tensor: Tensor, width: int, path: Path) -> Tensor:
    """An embedding's tensor as (n, width) vectors.

    Raises:
        UserError: of another width, or more of them than a text holds.
    """
    vectors = tensor.reshape(-1, tensor.shape[-1])
    if vectors.shape[1] != width or not 1 <= len(vectors) <= MOST_VECTORS:
        raise UserError(
            f"{path}: {vectors.shape[0]} vectors of width {vectors.shape[1]}; this encoder takes 1 to"
            f" {MOST_VECTORS} of width {width}: use an embedding made for this base"
        )
    return vectors
