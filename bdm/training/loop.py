"""The training loop. It knows nothing of what it trains: a recipe brings the parts, the data and the loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..config import RunConfig
from ..data.batch import Batch, stream
from ..files import atomic_write, write_json, write_text, writing_to
from ..parallel.processes import whole_weights
from .metrics import RunningMeans, log_picture, log_row, plot_metrics, read_metrics, start_trackers, timed
from .optimizers import learning_rate
from .recipes.base import Recipe
from .resuming import Progress, resume, save
from .setup import Work, set_up
from .stopping import SkippedSteps, Stopped, StopSignal


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
        work = set_up(run, recipe)
        # A run that is refused leaves its folder as it was.
        state = resume(run, work)
        _open_folder(run, work)
        try:
            _loop(run, work, state, stop)
            _publish(run, work, command)
        finally:
            for tracker in work.accelerator.trackers:
                tracker.finish()
    return run.out / "model"


def _open_folder(run: RunConfig, work: Work) -> None:
    """Make the run folder, write the configuration into it and start the trackers."""
    settings = run.model_dump(mode="json")
    if work.accelerator.is_main_process:
        with writing_to(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
            write_text(run.out / "config.yaml", text)
    work.accelerator.wait_for_everyone()
    start_trackers(work.accelerator, run.out, settings)


def _loop(run: RunConfig, work: Work, before: Progress, stop: StopSignal) -> None:
    config, accelerator, first = run.optimizer, work.accelerator, before.step
    processes, process = accelerator.num_processes, accelerator.process_index
    batches = stream(
        work.recipe.source,
        first * config.accumulation,
        config.steps * config.accumulation,
        config.batch_size // config.accumulation,
        run.seed,
        process,
        processes,
        run.workers,
        run.out / "unreadable.jsonl",
        run.unreadable_limit,
    )
    skipped = SkippedSteps(run.out, run.skip_limit, before.skipped, lambda i: _key(work.recipe.source, i))
    if before.step and not before.looked:
        _look(run, work, before.step)
    bar = tqdm(
        total=config.steps, initial=first, unit="step", disable=not accelerator.is_main_process, mininterval=2
    )
    means = RunningMeans()
    clock, logged = time.perf_counter(), first
    for step in range(first, config.steps):
        # Gradients.
        for group in work.optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group.get("factor", 1.0)
        # Dropout and whatever else draws from the global generator depends on the step alone, so a resume
        # draws the same.
        torch.manual_seed((run.seed * 0x9E3779B1 + step * processes + process) % 2**63)
        indices, terms = _gradients(work, batches, config.accumulation)
        # Weights.
        norm = work.ways.clip(work.parameters, config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if (
            finite or accelerator.scaler is not None
        ):  # the scaler of fp16 must see infinities to lower its scale
            work.optimizer.step()
        if finite:
            work.ema.step()
            means.add(terms)
        elif accelerator.scaler is None or not _finite_anywhere(accelerator, terms["loss"]):
            # Infinite gradients of a finite loss are how the scaler finds its scale, and no fault of the
            # batch.
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
            bar.set_postfix(
                {name: f"{value:.4f}" for name, value in row.items() if name == "loss"}, refresh=False
            )
        # Looks, states and the end. All processes take part: weights may be split over them.
        halt = _signal_anywhere(accelerator, stop.number)
        if not halt:
            _look(run, work, done)
        if done % run.checkpoint_every == 0 or done == config.steps or halt:
            save(run, work, Progress(done, looked=not halt, skipped=skipped.count))
        if halt:
            bar.close()
            # A launcher that sees one process end stops the others, and one may still be writing.
            accelerator.wait_for_everyone()
            raise Stopped(halt, done)
    bar.close()


def _gradients(
    work: Work, batches: Iterator[Batch], accumulation: int
) -> tuple[list[int], dict[str, Tensor]]:
    """Add the gradients of a step's batches.

    Returns which examples they had, and the means of their terms.
    """
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
            with atomic_write(run.out / "model") as folder:
                work.recipe.save(folder)
                write_json(folder / "card.json", _card(run, command))


def _card(run: RunConfig, command: str) -> dict[str, Any]:
    losses = [row for row in read_metrics(run.out) if "loss" in row]
    validation = [
        {k: v for k, v in row.items() if k != "step"} for row in read_metrics(run.out) if "seconds" not in row
    ]
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
