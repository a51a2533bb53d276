"""At which levels of noise a sampler stops: A1111's schedules, by their published formulas.

All are functions of the number of steps n and of the levels sigma_0 < ... < sigma_999 that the model was
trained at, with sigma_t^2 = (1 - alpha_bar_t) / alpha_bar_t. They give n levels, falling; a sampler goes on
from the last one to 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .beta_distribution import beta_quantiles

Levels = NDArray[np.float64]

#: Levels that were found to cost the least for SD1.5 (arXiv 2404.14507, "Align Your Steps", its quick start).
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def _at(t: Levels, trained: Levels) -> Levels:
    """The levels at timesteps that may lie between the trained ones: straight lines in the logarithm."""
    return np.exp(np.interp(t, np.arange(len(trained)), np.log(trained)))


def karras(n: int, trained: Levels) -> Levels:
    """arXiv 2206.00364, equation 5, with rho = 7."""
    low, high = trained[0] ** (1 / 7), trained[-1] ** (1 / 7)
    return (high + np.linspace(0, 1, n) * (low - high)) ** 7


def exponential(n: int, trained: Levels) -> Levels:
    """Equal steps of the logarithm; the polyexponential schedule with rho = 1, which is A1111's."""
    return np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), n))


def uniform(n: int, trained: Levels) -> Levels:
    """Equal steps of time, the last one at time 0."""
    return _at(np.linspace(len(trained) - 1, 0, n), trained)


def sgm_uniform(n: int, trained: Levels) -> Levels:
    """Equal steps of time, from one of which time 0 is the end."""
    return _at(np.linspace(len(trained) - 1, 0, n + 1)[:-1], trained)


def simple(n: int, trained: Levels) -> Levels:
    """Every (1000 / n)-th of the trained levels, from the last one on."""
    return trained[[len(trained) - 1 - int(i * len(trained) / n) for i in range(n)]]


def ddim(n: int, trained: Levels) -> Levels:
    """The steps of DDIM (arXiv 2010.02502, section 4.2): every (1000 // n)-th level, counted from time 1."""
    stride = max(len(trained) // n, 1)
    return trained[np.minimum(np.arange(n)[::-1] * stride + 1, len(trained) - 1)]


def beta(n: int, trained: Levels) -> Levels:
    """Quantiles of the beta distribution with both parameters 0.6 (arXiv 2407.12173)."""
    return trained[0] + beta_quantiles(np.linspace(1, 0, n), 0.6, 0.6) * (trained[-1] - trained[0])


def kl_optimal(n: int, trained: Levels) -> Levels:
    """Equal steps of the arc tangent (arXiv 2404.14507, theorem 3.1); step n is the lowest trained level."""
    low, high = np.arctan(trained[0]), np.arctan(trained[-1])
    return np.tan(high + np.arange(n) / n * (low - high))


def align_your_steps(n: int, trained: Levels) -> Levels:
    """A table for SD1.5, between whose levels the logarithm goes in straight lines."""
    table = np.log(np.array(ALIGN_YOUR_STEPS))
    places = np.linspace(0, 1, n) * (len(table) - 1)
    return np.exp(np.interp(places, np.arange(len(table)), table))


#: A1111's names of schedules, in its order. "Normal" is what ComfyUI calls "Uniform".
SCHEDULES: dict[str, Callable[[int, Levels], Levels]] = {
    "Uniform": uniform,
    "Karras": karras,
    "Exponential": exponential,
    "Polyexponential": exponential,
    "SGM Uniform": sgm_uniform,
    "KL Optimal": kl_optimal,
    "Align Your Steps": align_your_steps,
    "Simple": simple,
    "Normal": uniform,
    "DDIM": ddim,
    "Beta": beta,
}
#: Schedules that end at the lowest trained level instead of 0.
ENDS_AT_LOWEST = ("KL Optimal",)
