"""Connectors that were released for other text encoders, known by the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ConnectorSystem = Literal["MuLan", "GlueGen", "ELLA"]

#: Weights that a system's connector has and no other's, the last of which tells its width.
_SIGNS: dict[ConnectorSystem, tuple[str, ...]] = {
    "MuLan": ("proj.0.weight", "transformer.decoder.norm.weight", "queries"),
    "GlueGen": ("blocks.0.net_tok.0.weight", "tail.net_tok.0.weight", "tail.net_sen.0.weight"),
    "ELLA": ("time_embedding.linear_1.weight", "connector.proj_in.weight", "connector.latents"),
}


def connector_system(tensors: Mapping[str, Tensor]) -> ConnectorSystem | None:
    """Whose connector a file holds; None for every other file."""
    return next((name for name, signs in _SIGNS.items() if all(sign in tensors for sign in signs)), None)
