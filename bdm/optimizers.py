"""The optimizers by name, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from .config import OptimizerConfig
from .extras import import_extra


def make_optimizer(
    name: Literal["adamw", "adamw8bit", "prodigy"],
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """An optimizer of parameters.

    Args:
        name: ``adamw`` (fused), ``adamw8bit`` (moments in 8 bits, arXiv 2110.02861) or ``prodigy`` (finds its step size itself,
            arXiv 2306.06101; the learning rate is then a factor, normally 1).
        parameters: what is trained.
        learning_rate: of the first step.
        betas: decay of the moments.
        weight_decay: decoupled from the gradient.

    Raises:
        UserError: a package is missing.
    """
    options = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    if name == "adamw8bit":
        return import_extra(name, "optim").AdamW8bit(parameters, **options)
    if name == "prodigy":
        # Warm-up must not enter the estimate of the step size.
        return import_extra(name).Prodigy(parameters, safeguard_warmup=True, use_bias_correction=True, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then constant or a half cosine to zero. ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
