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

#: ``bundle_emb.NAME.KEY``, the key being one of an embedding's file; people choose names, dots and all.
BUNDLED = "bundle_emb."
_KEY = re.compile(
    r"bundle_emb\.(?P<name>.+?)(?:\.(?P<key>string_to_param\..*|emb_params|clip_l|clip_g))?", re.DOTALL
)
#: What A1111 keeps beside an embedding's vectors.
_BESIDE = re.compile(r"\.(?:string_to_token\.[^.]+|step|sd_checkpoint|sd_checkpoint_name|name)$")


def without_bundled(keys: Iterable[str]) -> list[str]:
    """The keys of an adapter's own tensors."""
    return [key for key in keys if not key.startswith(BUNDLED)]


def bundled_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of embeddings packed beside an adapter, under their whole keys."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}


def bundled_embeddings(file: WeightFile) -> dict[str, Tensor]:
    """The (n, D) vectors of embeddings packed beside an adapter, by the words that they stand for.

    Raises:
        UserError: tensors that are no vectors, several for one word, one made for SDXL, or NaN.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in bundled_tensors(file.tensors).items():
        if _BESIDE.search(key):
            continue
        parts = _KEY.fullmatch(key)
        # Words are kept with or without their brackets.
        name = re.sub(r"^<(.+)>$", r"\1", parts["name"]) if parts else ""
        if parts and parts["key"] == "clip_g":
            raise UserError(f"{file.path}: the embedding {name!r} in it is made for SDXL; use one for SD1.5")
        if not name or name in found or tensor.ndim not in (1, 2) or not tensor.is_floating_point():
            raise UserError(
                f"{file.path}: {printable(key, 120)!r} is not the one tensor of an embedding; the file is"
                " damaged"
            )
        found[name] = tensor.reshape(-1, tensor.shape[-1])
    _refuse_not_finite(found, file.path)
    return found


def _refuse_not_finite(vectors: Mapping[str, Tensor], path: Path) -> None:
    read = {f"the embedding {name!r}": tensor for name, tensor in vectors.items() if not tensor.is_meta}
    if read:
        from .weights import refuse_not_finite

        refuse_not_finite(read, path)
