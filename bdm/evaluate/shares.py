"""Shares of pictures, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] of ``count`` pictures.

    Attributes:
        value: the share.
        count: how many pictures it is of.
    """

    value: float
    count: int

    @classmethod
    def of(cls, hits: Tensor) -> Share:
        """The share of (N,) verdicts that are true."""
        return cls(hits.float().mean().item() if len(hits) else 0.0, len(hits))

    @classmethod
    def over(cls, shares: Sequence[Share]) -> Share:
        """The share of all pictures of several shares."""
        count = sum(share.count for share in shares)
        hits = sum(share.value * share.count for share in shares)
        return cls(hits / count if count else 0.0, count)

    @property
    def error(self) -> float:
        """The standard error of a share of independent pictures, sqrt(p (1 - p) / N)."""
        return math.sqrt(max(0.0, self.value * (1 - self.value)) / self.count) if self.count else 0.0

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def flat_figures(shares: Mapping[str, Share], prefix: str = "") -> dict[str, float]:
    """Figures by name, each share followed by its standard error under ``NAME_se``."""
    figures: dict[str, float] = {}
    for name, share in shares.items():
        figures[prefix + name] = round(share.value, 4)
        figures[f"{prefix}{name}_se"] = round(share.error, 4)
    return figures
