"""Textual-inversion embeddings (arXiv 2208.01618): vectors that a word stands for."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError
from .identify import identify, require
from .weights import WeightFile, refuse_not_finite


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
    tensors = [t for t in file.tensors.values() if t.is_floating_point() and t.ndim in (1, 2) and t.numel()]
    if len(tensors) != 1:
        raise UserError(f"{file.path} holds {len(tensors)} embeddings; give a file with one")
    vectors = tensors[0].reshape(-1, tensors[0].shape[-1])
    if vectors.shape[1] != width or not 1 <= len(vectors) <= 75:
        raise UserError(
            f"{file.path}: {vectors.shape[0]} vectors of width {vectors.shape[1]}; this encoder takes 1 to 75"
            f" of width {width}: use an embedding made for this base"
        )
    refuse_not_finite({"the embedding": vectors}, file.path)
    return vectors
