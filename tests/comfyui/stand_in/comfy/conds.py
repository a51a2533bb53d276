"""Conditions as samplers batch them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, cat


class CONDCrossAttn:
    """Text features (1, L, D) of one conditioning; in a batch they are repeated to one length."""

    def __init__(self, cond: Tensor) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, **others: object) -> CONDCrossAttn:
        return CONDCrossAttn(self.cond.expand(batch_size, -1, -1))

    def concat(self, others: Sequence[CONDCrossAttn]) -> Tensor:
        rows = [self.cond, *(other.cond for other in others)]
        length = math.lcm(*(row.shape[1] for row in rows))
        return cat([row.repeat(1, length // row.shape[1], 1) for row in rows])
