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
import yaml
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .averaging import AveragedWeights
from .checkpoint import writing_to
from .config import RunConfig
from .data.batch import Batch, stream
from .errors import UserError
from .metrics import RunningMeans, log_picture, log_row, plot_metrics, read_metrics, start_trackers
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
        # A run that is refused leaves its folder as it was.
        state = _resume(run, work)
        _open_folder(run, work)
        try:
            _loop(run, work, state, stop)
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
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("optimizer.mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU")
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
    parameters = trained(parts)
    return Work(recipe, parts, parameters, model, optimizer, AveragedWeights(parameters, config.ema_decay), ways)


def _open_folder(run: RunConfig, work: Work) -> None:
    """Make the run folder, write the configuration into it and start the trackers."""
    settings = run.model_dump(mode="json")
    if work.accelerator.is_main_process:
        with writing_to(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
            checkpoint.write_text(run.out / "config.yaml", text)
    work.accelerator.wait_for_everyone()
    start_trackers(work.accelerator, run.out, settings)


def _loop(run: RunConfig, work: Work, before: Progress, stop: StopSignal) -> None:
    config, accelerator, first = run.optimizer, work.accelerator, before.step
    processes, process = accelerator.num_processes, accelerator.process_index
    batches = stream(
        work.recipe.source, first * config.accumulation, config.steps * config.accumulation,
        config.batch_size // config.accumulation, run.seed, process, processes, run.workers, run.out / "unreadable.jsonl",
        run.unreadable_limit,
    )  # fmt: skip
    skipped = SkippedSteps(run.out, run.skip_limit, before.skipped, lambda i: _key(work.recipe.source, i))
    if before.step and not before.looked:
        _look(run, work, before.step)
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not accelerator.is_main_process, mininterval=2)
    means = RunningMeans()
    clock, logged = time.perf_counter(), first
    for step in range(first, config.steps):
        # Gradients.
        for group in work.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        # Dropout and whatever else draws from the global generator depends on the step alone, so a resume draws the same.
        torch.manual_seed((run.seed * 0x9E3779B1 + step * processes + process) % 2**63)
        indices, terms = _gradients(work, batches, config.accumulation)
        # Weights.
        norm = work.ways.clip(work.parameters, config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite or accelerator.scaler is not None:  # the scaler of fp16 must see infinities to lower its scale
            work.optimizer.step()
        if finite:
            work.ema.step()
            means.add(terms)
        elif accelerator.scaler is None or not _finite_anywhere(accelerator, terms["loss"]):
            # Infinite gradients of a finite loss are how the scaler finds its scale, and no fault of the batch.
            skipped.add(step, gather_object(indices), accelerator.is_main_process)
        work.optimizer.zero_grad(set_to_none=True)
        # Figures.
        done = step + 1
        bar.update()
        if done % run.log_every == 0:
            # Fewer steps than log_every where the run was resumed in between.
            count, logged = done - logged, done
            row, now = means.take(accelerator), time.perf_counter()
            speed = {"seconds": now - clock, "samples_per_second": count * config.batch_size / (now - clock)}
            log_row(accelerator, run.out, {"step": done, **row, "lr": learning_rate(step, config), **speed})
            clock = now
            bar.set_postfix({name: f"{value:.4f}" for name, value in row.items() if name == "loss"}, refresh=False)
        # Looks, states and the end. All processes take part: weights may be split over them.
        halt = _signal_anywhere(accelerator, stop.number)
        if not halt:
            _look(run, work, done)
        if done % run.checkpoint_every == 0 or done == config.steps or halt:
            _save(run, work, Progress(done, looked=not halt, skipped=skipped.count))
        if halt:
            bar.close()
            # A launcher that sees one process end stops the others, and one may still be writing.
            accelerator.wait_for_everyone()
            raise Stopped(halt, done)
    bar.close()


def _gradients(work: Work, batches: Iterator[Batch], accumulation: int) -> tuple[list[int], dict[str, Tensor]]:
    """Add the gradients of a step's batches; returns which examples they had, and the means of their terms."""
    indices: list[int] = []
    means: dict[str, Tensor] = {}
    for _ in range(accumulation):
        batch = next(batches)
        indices += batch.indices
        with work.ways.accumulate(work.model):
            terms = work.model(batch)
            work.accelerator.backward(terms["loss"])  # divides by the accumulation
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.detach().float() / accumulation
    return indices, means


def _finite_anywhere(accelerator: Any, loss: Tensor) -> bool:
    """Whether the loss is finite in all processes."""
    return bool(accelerator.gather(torch.isfinite(loss).view(1)).all())


def _key(source: Any, index: int) -> Any:
    """What messages call an example: its key, or its number where the source has no keys."""
    return source.key(index) if hasattr(source, "key") else index


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


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        looked: whether the last one's validation and grid, if due, are done.
        skipped: steps that were left out.
    """

    step: int = 0
    looked: bool = True
    skipped: int = 0


def _save(run: RunConfig, work: Work, progress: Progress) -> None:
    main, scaler = work.accelerator.is_main_process, work.accelerator.scaler
    with timed("state"):
        state = {
            **vars(progress),
            "run": _meaning(run),
            "bucket_batch": _bucket_batch(run, work.recipe.source),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "parts": {name: gathered(part.state_dict(), main) for name, part in work.parts.items()},
            "optimizer": work.ways.optimizer_state(work.optimizer, work.parameters),
            "ema": gathered(work.ema.state_dict(), main),
        }
        if main:
            checkpoint.save_state(run.out / "states", progress.step, state, run.keep_last, run.keep_every)


def _resume(run: RunConfig, work: Work) -> Progress:
    """Go on from the newest state, whichever way and number of processes it was saved with; returns how far it is.

    The examples, their order and all that is drawn for a sample are the same with any number of processes. What a model draws
    from the global generator (dropout) and the rounding of sums over processes are not.
    """
    state = checkpoint.load_state(run.out / "states")
    if state is None:
        return Progress()
    if changes := _differences(_saved_meaning(state["run"], run), json.loads(_meaning(run))):
        raise UserError(
            f"{run.out} holds a run with another configuration, and going on would mix the two ({'; '.join(changes)}); "
            "choose another out=, set the values back, or delete the folder"
        )
    saved, own = state.get("bucket_batch"), _bucket_batch(run, work.recipe.source)
    if saved not in (None, own):
        raise UserError(
            f"{run.out} was run with batches of {saved} samples of one bucket, and now they would have {own}, so that others come "
            "together; keep batch_size / accumulation as it was"
        )
    for name, part in work.parts.items():
        load_part(part, state["parts"][name])
    work.ways.load_optimizer_state(work.optimizer, work.parameters, state["optimizer"])
    average = [scattered(saved, own) for saved, own in zip(state["ema"]["average"], work.ema.average, strict=True)]
    work.ema.load_state_dict({**state["ema"], "average": average})
    if work.accelerator.scaler is not None and state.get("scaler"):
        work.accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(state["step"], state.get("looked", True), state.get("skipped", 0))


def _bucket_batch(run: RunConfig, source: Any) -> int | None:
    """Samples that must come from one bucket together, over all processes; None where there are no buckets."""
    return run.optimizer.batch_size // run.optimizer.accumulation if getattr(source, "bucket_of", None) is not None else None


def _meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as JSON."""
    ignored: Any = dict.fromkeys(
        ("out", "threads", "workers", "log_every", "validate_every", "grid_every", "checkpoint_every", "keep_last", "keep_every",
         "skip_limit", "unreadable_limit", "trackers"), True,
    )  # fmt: skip
    # How a step is divided changes its rounding only; fewer processes need more accumulation.
    ignored["optimizer"] = {"accumulation", "checkpointing"}
    ignored["recipe"], ignored["data"] = {"grid_prompts", "grid_guidance"}, {"cache"}
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
    with work.ema.applied():
        work.recipe.finish()
        _write_model(run, work, command)
    work.accelerator.wait_for_everyone()


def _write_model(run: RunConfig, work: Work, command: str) -> None:
    with whole_weights(work.parts):
        if work.accelerator.is_main_process:
            partial = run.out / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            work.recipe.save(partial)
            checkpoint.write_json(partial / "card.json", _card(run, command))
            checkpoint.publish_folder(partial, run.out / "model")


def _card(run: RunConfig, command: str) -> dict[str, Any]:
    losses = [row for row in read_metrics(run.out) if "loss" in row]
    validation = [{k: v for k, v in row.items() if k != "step"} for row in read_metrics(run.out) if "seconds" not in row]
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
