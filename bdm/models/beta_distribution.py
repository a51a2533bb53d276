"""Quantiles of the beta distribution, without SciPy."""

from __future__ import annotations

from math import lgamma

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def beta_quantiles(shares: Numbers, a: float, b: float) -> Numbers:
    """The values below which shares of a beta distribution lie.

    Args:
        shares: (n,) in [0, 1].
        a: parameter at 0, greater than 0.
        b: parameter at 1, greater than 0.

    Returns:
        (n,) values in [0, 1], to about 1e-15.
    """
    low, high = np.zeros_like(shares), np.ones_like(shares)
    for _ in range(60):  # each halves what is left
        middle = (low + high) / 2
        above = _share_below(middle, a, b) < shares
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(shares <= 0, 0.0, np.where(shares >= 1, 1.0, (low + high) / 2))


def _share_below(x: Numbers, a: float, b: float) -> Numbers:
    """The regularised incomplete beta function (DLMF 8.17.22), on the side where its fraction converges."""
    far = x > (a + 1) / (a + b + 2)
    x, a_of, b_of = np.where(far, 1 - x, x), np.where(far, b, a), np.where(far, a, b)
    x = np.clip(x, 1e-300, 1.0)
    logarithm = a_of * np.log(x) + b_of * np.log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b)
    share = np.exp(logarithm) / a_of / _fraction(x, a_of, b_of)
    return np.where(far, 1 - share, share)


def _fraction(x: Numbers, a: Numbers, b: Numbers, terms: int = 60) -> Numbers:
    """1 + d_1 / (1 + d_2 / (1 + ...)), from its far end."""
    value = np.ones_like(x)
    for n in range(terms, 0, -1):
        m = n // 2
        if n % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1.0 + d / value
    return value
