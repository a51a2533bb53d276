"""What a run works with: the recipe's parts, their optimizer and average, and how processes share them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig, RunConfig
from ..errors import UserError
from ..parallel.processes import Share, make_accelerator
from ..parallel.strategies import Strategy, choose_strategy
from ..parallel.whole import local
from .averaging import AveragedWeights
from .copying import Gate
from .optimizers import make_optimizer, parameter_groups, parameter_names
from .recipes.base import Recipe

#: Packages whose forward passes change no weights.
KNOWN = ("bdm", "diffusers", "peft", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What changes while a run trains, and who changes it.

    Attributes:
        recipe: what is trained.
        parts: its sub-modules that receive gradients, by name.
        parameters: theirs, in one order everywhere: the optimizer's, by which its states are numbered.
        names: what they are called.
        model: what to call for the loss; the recipe, shared by the processes.
        optimizer: of the parameters.
        ema: their average.
        strategy: how the processes share the work.
        corpus: what the order of the examples follows from, in short.
        gate: holds up changes of weights, moments and averages.
        steady_weights: whether forward passes are known to leave weights as they are.
    """

    recipe: Recipe
    parts: dict[str, nn.Module]
    parameters: list[nn.Parameter]
    names: list[str]
    model: nn.Module
    optimizer: Any
    ema: AveragedWeights
    strategy: Strategy
    corpus: str
    gate: Gate
    steady_weights: bool

    @property
    def accelerator(self) -> Any:
        """What joins the processes."""
        return self.strategy.accelerator

    def steady(self) -> list[Tensor]:
        """This process's tensors that nothing changes before the gate is passed."""
        weights = self.parameters if self.steady_weights else []
        return [local(t) for t in (*self.strategy.steady(self.optimizer, weights), *self.ema.average)]


def set_up(run: RunConfig, recipe: Recipe) -> TrainState:
    """Put a recipe's parts on their device, shared by the processes, with their optimizer and their average.

    Raises:
        UserError: a batch that the processes cannot share, or a precision that the device does not have.
    """
    config = run.optimizer
    # Processes.
    accelerator = make_accelerator(
        config.mixed_precision,
        config.accumulation,
        run.collective_timeout,
        log_with=list(run.trackers) or None,
        project_dir=str(run.out / "trackers"),
    )
    recipe.share = Share(accelerator)
    micro_batch = _micro_batch(config, accelerator.num_processes)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("optimizer.mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU")
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    # Models.
    parts = recipe.train_parts(config.checkpointing)
    parameter_groups(parts, config.rate_factors)  # a wrong pattern is refused before anything heavy
    recipe.to(accelerator.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    steady_weights = _steady_weights(recipe)
    # Who trains them.
    strategy = choose_strategy(accelerator, config.mixed_precision, micro_batch, config.max_grad_norm)
    model, optimizer = strategy.distribute(recipe, parts, partial(_optimizer, config))
    if config.compile:
        for part in parts.values():
            part.compile(dynamic=False)
    parameters = [p for group in parameter_groups(parts, config.rate_factors) for p in group["params"]]
    gate = Gate()
    strategy.before_steps(optimizer, gate.passed)
    return TrainState(
        recipe=recipe,
        parts=parts,
        parameters=parameters,
        names=parameter_names(parts, config.rate_factors),
        model=model,
        optimizer=optimizer,
        ema=AveragedWeights(parameters, config.ema_decay, config.ema_device == "cpu", gate),
        strategy=strategy,
        corpus=_corpus(recipe.source),
        gate=gate,
        steady_weights=steady_weights,
    )


def _corpus(source: Any) -> str:
    """Sizes, buckets and filters of the data: where they are the same, so is the order of the examples."""
    if hasattr(source, "corpus"):
        return source.corpus
    if hasattr(source, "corpus_of"):
        return source.corpus_of(_corpus)
    kept = getattr(source, "kept", None)
    sizes, buckets = getattr(source, "shard_sizes", None), getattr(source, "bucket_of", None)
    digest = hashlib.sha256(json.dumps([len(source), sizes]).encode())
    if buckets is not None:
        digest.update(buckets.tobytes())
    if kept is not None:
        digest.update(kept.tobytes())
    shards = f" in {len(sizes)} shards" if sizes else ""
    return f"{len(source)} examples{shards}, {digest.hexdigest()[:16]}"


def _steady_weights(recipe: nn.Module) -> bool:
    """Whether forward passes leave weights as they are.

    What those of other packages do is not known; embeddings of a largest norm scale their rows.
    """
    known = (type(module).__module__.partition(".")[0] in KNOWN for module in recipe.modules())
    return all(known) and all(getattr(module, "max_norm", None) is None for module in recipe.modules())


def _micro_batch(config: OptimizerConfig, processes: int) -> int:
    """Samples that a process takes at once."""
    micro_batch, rest = divmod(config.batch_size, processes * config.accumulation)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {processes} processes x"
            f" {config.accumulation} accumulation steps; make it divisible"
        )
    return micro_batch


def _optimizer(config: OptimizerConfig, parts: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    return make_optimizer(
        config.name,
        parameter_groups(parts, config.rate_factors),
        config.learning_rate,
        config.betas,
        config.weight_decay,
    )
