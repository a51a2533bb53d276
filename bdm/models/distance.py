"""How far a network's weights moved from those of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightDistance:
    """By how much weights differ from others.

    Attributes:
        changed: share of the tensors in which any value differs, in [0, 1].
        relative: norm of the difference of all weights over the norm of the others.
    """

    changed: float
    relative: float


@torch.no_grad()
def weight_distance(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> WeightDistance:
    """By how much weights moved from others of the same names and shapes; sums are in float64."""
    assert weights.keys() == others.keys(), "weights of one architecture"
    changed, difference, norm = 0, 0.0, 0.0
    for name, other in others.items():
        before = other.detach().cpu()
        now = weights[name].detach().to("cpu", before.dtype)
        changed += not torch.equal(now, before)
        difference += (now.double() - before.double()).square().sum().item()
        norm += before.double().square().sum().item()
    return WeightDistance(changed / max(1, len(others)), (difference / norm) ** 0.5 if norm else 0.0)
