"""What a run works on: the recipe's parts, their optimizer and average, and how processes share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import RunConfig
from ..errors import UserError
from ..parallel.processes import Replicas, make_accelerator, spread
from .averaging import AveragedWeights
from .optimizers import make_optimizer, parameter_groups
from .recipes.base import Recipe


@dataclass(frozen=True)
class Work:
    """What a run works on.

    Attributes:
        recipe: what is trained.
        parts: its sub-modules that receive gradients, by name.
        parameters: theirs, in one order everywhere.
        model: what to call for the loss; the recipe, spread over the processes.
        optimizer: of the parameters.
        ema: their average.
        ways: how the processes share the work.
    """

    recipe: Recipe
    parts: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    model: nn.Module
    optimizer: Any
    ema: AveragedWeights
    ways: Replicas

    @property
    def accelerator(self) -> Any:
        """What joins the processes."""
        return self.ways.accelerator


def set_up(run: RunConfig, recipe: Recipe) -> Work:
    """Put a recipe's parts on their device, spread over the processes, with their optimizer and their
    average.

    Raises:
        UserError: a batch that the processes cannot share, or a precision that the device does not have.
    """
    config = run.optimizer
    accelerator = make_accelerator(
        config.mixed_precision,
        config.accumulation,
        log_with=list(run.trackers) or None,
        project_dir=str(run.out / "trackers"),
    )
    micro, rest = divmod(config.batch_size, accelerator.num_processes * config.accumulation)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes x"
            f" {config.accumulation} accumulation steps; make it divisible"
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    parts = recipe.train_parts(config.checkpointing)
    parameter_groups(parts, config.rate_factors)  # a wrong pattern is refused before anything heavy
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("optimizer.mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU")
    recipe.to(accelerator.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    recipe.prepare(accelerator)
    ways = spread(accelerator, config.mixed_precision, micro, config.max_grad_norm)
    model, optimizer = ways.prepare(
        recipe,
        parts,
        lambda own: make_optimizer(
            config.name,
            parameter_groups(own, config.rate_factors),
            config.learning_rate,
            config.betas,
            config.weight_decay,
        ),
    )
    if config.compile:
        for part in parts.values():
            part.compile(dynamic=False)
    # In the optimizer's order, by which its states are numbered.
    parameters = [
        parameter for group in parameter_groups(parts, config.rate_factors) for parameter in group["params"]
    ]
    return Work(
        recipe, parts, parameters, model, optimizer, AveragedWeights(parameters, config.ema_decay), ways
    )
