"""The training loop. It knows nothing of what it trains: a recipe brings the parts, the data and the loss."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .averaging import AveragedWeights
from .config import RunConfig
from .data.batch import Batch, stream
from .errors import UserError
from .metrics import log_picture, log_row, plot_metrics, read_metrics, start_trackers
from .optimizers import learning_rate, make_optimizer
from .parallel import Replicas, gathered, load_part, make_accelerator, scattered, spread, trained, whole_weights
from .recipes.base import Recipe
from .stopping import SkippedSteps, Stopped, StopSignal

logger = logging.getLogger("bdm")


def train(run: RunConfig, recipe: Recipe, command: str = "") -> Path:
    """Run ``recipe`` to the end, resuming where an earlier run in the same folder stopped.

    Args:
        run: the configuration.
        recipe: what is trained.
        command: the command line that repeats the run, for the model's card.

    Returns:
        The folder of the finished model, ``out/model``.

    Raises:
        Stopped: after SIGTERM or SIGUSR1; the state is saved.
        UserError: see the parts.
    """
    with StopSignal() as stop:
        work = _set_up(run, recipe)
        try:
            _loop(run, work, _resume(run, work), stop)
            _publish(run, work, command)
        finally:
            for tracker in work.accelerator.trackers:
                tracker.finish()
    return run.out / "model"


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


def _set_up(run: RunConfig, recipe: Recipe) -> Work:
    config = run.optimizer
    accelerator = make_accelerator(
        config.mixed_precision, config.accumulation, log_with=list(run.trackers) or None, project_dir=str(run.out / "trackers")
    )
    micro, rest = divmod(config.batch_size, accelerator.num_processes * config.accumulation)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes x {config.accumulation} "
            "accumulation steps; make it divisible"
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    parts = recipe.train_parts(config.checkpointing)
    recipe.to(accelerator.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    recipe.prepare(accelerator)
    ways = spread(accelerator, config.mixed_precision, micro, config.max_grad_norm)
    model, optimizer = ways.prepare(
        recipe, parts,
        lambda own: make_optimizer(config.name, own, config.learning_rate, config.betas, config.weight_decay),
    )  # fmt: skip
    if config.compile:
        for part in parts.values():
            part.compile(dynamic=False)
    start_trackers(accelerator, run.out, run.model_dump(mode="json"))
    parameters = trained(parts)
    return Work(recipe, parts, parameters, model, optimizer, AveragedWeights(parameters, config.ema_decay), ways)


def _loop(run: RunConfig, work: Work, first: int, stop: StopSignal) -> None:
    config, accelerator = run.optimizer, work.accelerator
    processes, process = accelerator.num_processes, accelerator.process_index
    batches = stream(
        work.recipe.source, first * config.accumulation, config.steps * config.accumulation,
        config.batch_size // config.accumulation, run.seed, process, processes, run.workers, run.out / "unreadable.jsonl",
        run.unreadable_limit,
    )  # fmt: skip
    skipped = SkippedSteps(run.out, run.skip_limit)
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not accelerator.is_main_process, mininterval=2)
    averages: dict[str, Tensor] = {}
    clock, logged = time.perf_counter(), first
    for step in range(first, config.steps):
        # Gradients.
        for group in work.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        # Dropout and whatever else draws from the global generator depends on the step alone, so a resume draws the same.
        torch.manual_seed((run.seed * 0x9E3779B1 + step * processes + process) % 2**63)
        indices = _gradients(work, batches, config.accumulation, averages)
        # Weights.
        norm = work.ways.clip(work.parameters, config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite or config.mixed_precision == "fp16":  # the fp16 scaler must see infinities to lower its scale
            work.optimizer.step()
        if finite:
            work.ema.step()
        else:
            skipped.add(step, gather_object(indices), accelerator.is_main_process)
        work.optimizer.zero_grad(set_to_none=True)
        # Figures.
        done = step + 1
        bar.update()
        if done % run.log_every == 0:
            # Fewer steps than log_every where the run was resumed in between.
            count, logged = done - logged, done
            row, now = _means(accelerator, averages, count), time.perf_counter()
            speed = {"seconds": now - clock, "samples_per_second": count * config.batch_size / (now - clock)}
            log_row(accelerator, run.out, {"step": done, **row, "lr": learning_rate(step, config), **speed})
            clock = now
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        # Looks, states and the end. All processes take part: weights may be split over them.
        halt = _signal_anywhere(accelerator, stop.number)
        if not halt:
            _look(run, work, done)
        if done % run.checkpoint_every == 0 or done == config.steps or halt:
            _save(run, work, done)
        if halt:
            bar.close()
            # A launcher that sees one process end stops the others, and one may still be writing.
            accelerator.wait_for_everyone()
            raise Stopped(halt, done)
    bar.close()


def _gradients(work: Work, batches: Iterator[Batch], accumulation: int, averages: dict[str, Tensor]) -> list[int]:
    """Add the gradients of a step's batches, and their terms to ``averages``; returns which examples they had."""
    indices: list[int] = []
    for _ in range(accumulation):
        batch = next(batches)
        indices += batch.indices
        with work.ways.accumulate(work.model):
            terms = work.model(batch)
            work.accelerator.backward(terms["loss"])  # divides by the accumulation
        for name, value in terms.items():
            # Kept as tensors: reading a number would make the processor wait for the accelerator in every step.
            averages[name] = averages.get(name, 0.0) + value.detach() / accumulation
    return indices


def _means(accelerator: Any, sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """The means of sums of ``count`` steps over all processes; the sums start anew."""
    values = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "mean") / count
    row = dict(zip(sums, values.tolist(), strict=True))
    sums.clear()
    return row


def _signal_anywhere(accelerator: Any, number: int) -> int:
    """The signal that came to any process, which may be one of them only; 0 for none."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def _look(run: RunConfig, work: Work, done: int) -> None:
    """Validation losses and the sample grid, with the averaged weights, in the steps where they are due."""
    last = done == run.optimizer.steps
    validate, draw = last or done % run.validate_every == 0, last or done % run.grid_every == 0
    if not (validate or draw):
        return
    modes = [(module, module.training) for module in work.recipe.modules()]
    work.recipe.eval()
    # Looking takes other batch sizes than training, and compiling for each would take longer than the look.
    with work.ema.applied(), torch.compiler.set_stance("force_eager"):
        if validate:
            with timed("validation"):
                figures = {f"validation/{k}": v for k, v in work.recipe.validate().items()}
            log_row(work.accelerator, run.out, {"step": done, **figures})
            if work.accelerator.is_main_process:
                plot_metrics(run.out)
        if draw:
            with timed("grid"):
                picture = work.recipe.grid()
            if picture is not None:
                log_picture(work.accelerator, run.out, picture, done)
    for module, mode in modes:  # each its own: frozen models stay in evaluation mode
        module.training = mode


def _save(run: RunConfig, work: Work, done: int) -> None:
    main = work.accelerator.is_main_process
    with timed("state"):
        state = {
            "step": done,
            "run": _meaning(run),
            "parts": {name: gathered(part.state_dict(), main) for name, part in work.parts.items()},
            "optimizer": work.ways.optimizer_state(work.optimizer, work.parameters),
            "ema": gathered(work.ema.state_dict(), main),
        }
        if main:
            checkpoint.save_state(run.out / "states", done, state, run.keep_last, run.keep_every)


def _resume(run: RunConfig, work: Work) -> int:
    """Go on from the newest state, whichever way and number of processes it was saved with; returns its step.

    The examples, their order and all that is drawn for a sample are the same with any number of processes. What a model draws
    from the global generator (dropout) and the rounding of sums over processes are not.
    """
    state = checkpoint.load_state(run.out / "states")
    if state is None:
        return 0
    if changes := _differences(_saved_meaning(state["run"], run), json.loads(_meaning(run))):
        raise UserError(
            f"{run.out} holds a run with another configuration, and going on would mix the two ({'; '.join(changes)}); "
            "choose another out=, set the values back, or delete the folder"
        )
    for name, part in work.parts.items():
        load_part(part, state["parts"][name])
    work.ways.load_optimizer_state(work.optimizer, work.parameters, state["optimizer"])
    average = [scattered(saved, own) for saved, own in zip(state["ema"]["average"], work.ema.average, strict=True)]
    work.ema.load_state_dict({**state["ema"], "average": average})
    return state["step"]


def _meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as JSON."""
    ignored: Any = dict.fromkeys(
        ("out", "threads", "workers", "log_every", "validate_every", "grid_every", "checkpoint_every", "keep_last", "keep_every",
         "skip_limit", "unreadable_limit", "trackers"), True,
    )  # fmt: skip
    # How a step is divided changes its rounding only; fewer processes need more accumulation.
    ignored["optimizer"] = {"accumulation", "checkpointing"}
    return run.model_dump_json(exclude=ignored)


def _saved_meaning(saved: str, run: RunConfig) -> Any:
    """A state's configuration, with the defaults of settings that did not exist when it was saved."""
    old = json.loads(saved)
    with suppress(ValidationError):
        return json.loads(_meaning(RunConfig.model_validate(old | {"out": run.out})))
    return old


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two configurations: "optimizer.steps: 100 -> 200"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def _publish(run: RunConfig, work: Work, command: str) -> None:
    """Save the averaged weights as the finished model, with a card that says how they came about."""
    work.recipe.eval()
    work.accelerator.wait_for_everyone()
    with work.ema.applied(), whole_weights(work.parts):
        if work.accelerator.is_main_process:
            partial = run.out / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            work.recipe.save(partial)
            checkpoint.write_json(partial / "card.json", _card(run, command))
            checkpoint.publish_folder(partial, run.out / "model")
    work.accelerator.wait_for_everyone()


def _card(run: RunConfig, command: str) -> dict[str, Any]:
    losses = [row for row in read_metrics(run.out) if "loss" in row]
    validation = [{k: v for k, v in row.items() if k != "step"} for row in read_metrics(run.out) if "loss" not in row]
    return {
        "command": command,
        "seed": run.seed,
        "steps": run.optimizer.steps,
        "seconds": round(sum(row["seconds"] for row in losses)),
        "threads": torch.get_num_threads(),
        "final_loss": losses[-1]["loss"] if losses else None,
        "validation": validation[-1] if validation else {},
        "torch": torch.__version__,
    }


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Note in the log how long the ``with`` block took."""
    start = time.perf_counter()
    yield
    logger.info("%s: %.2f s", what, time.perf_counter() - start)
