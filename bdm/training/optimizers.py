"""The optimizers by name, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from ..config import OptimizerConfig
from ..errors import UserError
from ..extras import import_extra


def parameter_groups(parts: Mapping[str, nn.Module], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters of the parts that are trained, those with equal factors of the learning rate together.

    Args:
        parts: sub-modules by name.
        factors: by pattern of the parameter's name ("branch.controlnet_*"); the first that fits counts, 1
            without one.

    Returns:
        For each factor, 1 first, a dictionary of ``params`` and ``factor``; the same order everywhere.

    Raises:
        UserError: a pattern that fits no parameter.
    """
    groups = [
        {"params": list(named.values()), "factor": factor} for factor, named in _named(parts, factors).items()
    ]
    return [group for group in groups if group["params"]]


def parameter_names(parts: Mapping[str, nn.Module], factors: Mapping[str, float]) -> list[str]:
    """Names of the parameters ("PART.NAME") in the order of ``parameter_groups``."""
    return [name for named in _named(parts, factors).values() for name in named]


def _named(
    parts: Mapping[str, nn.Module], factors: Mapping[str, float]
) -> dict[float, dict[str, nn.Parameter]]:
    """The parameters by their factor and their name."""
    groups: dict[float, dict[str, nn.Parameter]] = {1.0: {}}
    every = {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    used: set[str] = set()
    for name, parameter in every.items():
        fitting = next((pattern for pattern in factors if fnmatchcase(name, pattern)), None)
        used |= {fitting} if fitting else set()
        groups.setdefault(factors[fitting] if fitting else 1.0, {})[name] = parameter
    if unused := [pattern for pattern in factors if pattern not in used]:
        some = next(iter(every), "none")
        raise UserError(
            f"optimizer.rate_factors: no trained parameter is named {unused[0]!r}; names are such as {some}:"
            " correct or remove it"
        )
    return groups


def make_optimizer(
    name: Literal["adamw", "adamw8bit", "prodigy"],
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """An optimizer of parameters.

    Args:
        name: ``adamw`` (fused), ``adamw8bit`` (moments in 8 bits, arXiv 2110.02861) or ``prodigy`` (finds its
            step size itself, arXiv 2306.06101; the learning rate is then a factor, normally 1).
        parameters: what is trained, or groups of it (see ``parameter_groups``).
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
        return import_extra(name).Prodigy(
            parameters, safeguard_warmup=True, use_bias_correction=True, **options
        )
    return torch.optim.AdamW(parameters, fused=True, **options)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of parameters its factor of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then constant or a half cosine to zero. ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
