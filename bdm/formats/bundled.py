"""Embeddings that trainers pack into an adapter's file, beside the factors that were trained with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .header import WeightFile

if TYPE_CHECKING:
    from torch import Tensor

#: How the keys of embeddings begin that lie in an adapter's file.
BUNDLED = "bundle_emb."
#: Then follow the word, dots and all, and a key of an embedding's file.
_VECTORS = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<key>string_to_param\.[^.]+|emb_params|clip_l|clip_g)", re.DOTALL
)
#: What A1111 keeps beside an embedding's vectors.
_BESIDE_VECTORS = re.compile(r"\.(?:string_to_token\.[^.]+|step|sd_checkpoint|sd_checkpoint_name|name)$")


def without_bundled(keys: Iterable[str]) -> list[str]:
    """The keys of an adapter's own tensors."""
    return [key for key in keys if not key.startswith(BUNDLED)]


def bundled_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of embeddings packed beside an adapter, under their whole keys."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}


def bundled_embeddings(file: WeightFile) -> dict[str, Tensor]:
    """The (n, D) vectors of embeddings packed beside an adapter, by the words that they stand for.

    Raises:
        UserError: a form that is not known, one made for SDXL, two for one word, or NaN.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in bundled_tensors(file.tensors).items():
        if _BESIDE_VECTORS.search(key):
            continue
        form = _VECTORS.fullmatch(key)
        if form and form["key"] == "clip_g":
            raise UserError(
                f"{file.path} bundles {form['word']!r}, which is made for SDXL; give one for SD1.5"
            )
        if form is None or not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
            raise UserError(
                f"{file.path} bundles {printable(key, 120)!r} of shape {tuple(tensor.shape)}, which is no"
                " embedding for SD1.5; give a file without it"
            )
        word = re.sub(r"^<(.+)>$", r"\1", form["word"])  # words are kept with or without their brackets
        if word in found:
            raise UserError(f"{file.path} bundles two embeddings for the word {word!r}; give a file with one")
        found[word] = tensor.reshape(-1, tensor.shape[-1])
    _refuse_not_finite(found, file.path)
    return found


def _refuse_not_finite(vectors: Mapping[str, Tensor], path: Path) -> None:
    read = {f"the embedding {name!r}": tensor for name, tensor in vectors.items() if not tensor.is_meta}
    if read:
        from .weights import refuse_not_finite

        refuse_not_finite(read, path)
