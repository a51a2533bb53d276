"""The training loop. It knows nothing of what it trains: a recipe brings the parts, the data and the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor

from ..config import RunConfig
from ..data.batch import Batch, stream
from ..files import write_text, writing_to
from .beginning import begin
from .evaluating import evaluate
from .metrics import StepLog, start_trackers
from .observing import DeviceMemory, GradientNorms, Observer, Observers, PhaseClock
from .optimizers import learning_rate, set_learning_rate
from .own_data import OwnData, own_data
from .profiling import ProfileWindow
from .publishing import publish
from .recipes.base import Recipe
from .resuming import Progress, resume, save
from .setup import TrainState, set_up
from .states import StateWriter
from .stopping import SkippedSteps, Stopped, StopSignal


def train(
    run: RunConfig,
    recipe: Recipe,
    command: str = "",
    allow: Sequence[str] = (),
    observers: Sequence[Observer] = (),
) -> Path:
    """Run ``recipe`` to the end, resuming where an earlier run in the same folder stopped.

    Args:
        run: the configuration.
        recipe: what is trained.
        command: the command line that repeats the run, for the model's card.
        allow: settings that may be others than the earlier run's, such as "optimizer.steps".
        observers: who else looks on.

    Returns:
        The folder of the finished model, ``out/model``.

    Raises:
        Stopped: after SIGTERM or SIGUSR1; the state is saved.
        UserError: see the parts.
    """
    with StopSignal(run.time_limit) as stop:
        state = set_up(run, recipe)
        # A run that is refused leaves its folder as it was, and is refused before anything takes minutes.
        progress = resume(run, state, allow) or begin(run, state)
        own = own_data(run, recipe, state.accelerator)
        recipe.fill_caches(state.accelerator)
        _open_folder(run, state, progress.step)
        seen = Observers([*_observers(run, state), *observers])
        writer = StateWriter(run.background_states)
        try:
            progress = _loop(run, state, progress, stop, seen, writer, own)
            writer.wait()
            publish(run, state, command, progress)
        finally:
            seen.close()
            writer.close()
            for tracker in state.accelerator.trackers:
                tracker.finish()
    return run.out / "model"


def _observers(run: RunConfig, state: TrainState) -> list[Observer]:
    """Those who look on in every run, and whom the configuration asks for."""
    accelerator = state.accelerator
    seen = [PhaseClock(accelerator), GradientNorms(state.parts), DeviceMemory(accelerator)]
    if run.profile and accelerator.is_main_process:
        window = run.profile.first, run.profile.steps
        seen.append(ProfileWindow(run.out / "profile", *window, accelerator.device.type))
    return seen


def _open_folder(run: RunConfig, state: TrainState, step: int) -> None:
    """Make the run folder, write the configuration into it and start the trackers."""
    settings = run.model_dump(mode="json")
    if state.accelerator.is_main_process:
        with writing_to(run.out):
            run.out.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
            write_text(run.out / "config.yaml", text)
    state.accelerator.wait_for_everyone()
    start_trackers(state.accelerator, run.out, settings, step)


def _loop(
    run: RunConfig,
    state: TrainState,
    before: Progress,
    stop: StopSignal,
    seen: Observer,
    writer: StateWriter,
    own: OwnData | None,
) -> Progress:
    config, accelerator = run.optimizer, state.accelerator
    faults: Counter[str] = Counter()
    number, progress = before.at_batch(config.batch_size // config.accumulation)
    batches = _batches(run, state, number, config.steps - before.step, faults)
    skipped = SkippedSteps(run.out, run.skip_limit, before.skipped, lambda i: _key(state.recipe.source, i))
    if before.step and not before.evaluated:
        progress = _evaluated(run, state, progress, own)
    log = StepLog(run, accelerator, before.step, seen)
    for step in range(before.step, config.steps):
        # Gradients.
        seen.before(step)
        rate = learning_rate(step, config)
        set_learning_rate(state.optimizer, rate)
        _seed(run.seed, step, accelerator)
        indices, terms = _gradients(state, batches, config.accumulation, seen)
        norm = state.strategy.clip(state.parameters, config.max_grad_norm)
        seen.gradients(norm, log.due(step + 1))
        # Weights, once a state that is still being copied has them as they are.
        with seen.phase("state"):
            state.gate.passed()
        with seen.phase("weights"):
            _change_weights(state, norm)
        if torch.isfinite(norm):
            log.add({**terms, "grad_norm": norm})
        elif _at_fault(accelerator, terms["loss"]):
            skipped.add(step, gather_object(indices), accelerator.is_main_process)
        # Figures.
        done = step + 1
        log.step(done, rate, faults)
        # Evaluations, states and the end. All processes take part: weights may be split over them.
        halt = _signal_anywhere(accelerator, stop.number)
        progress = replace(
            progress,
            step=done,
            evaluated=not halt,
            skipped=skipped.count,
            samples=progress.samples + config.batch_size,
        )
        if not halt:
            with seen.phase("evaluation"):
                progress = _evaluated(run, state, progress, own)
        best = progress.best_step == done
        if done % run.checkpoint_every == 0 or done == config.steps or halt or best:
            with seen.phase("state"):
                save(run, state, progress, writer)
        if halt:
            log.close()
            writer.wait()
            # A launcher that sees one process end stops the others, and one may still be writing.
            accelerator.wait_for_everyone()
            raise Stopped(halt, done)
    log.close()
    return progress


def _evaluated(run: RunConfig, state: TrainState, progress: Progress, own: OwnData | None) -> Progress:
    """The progress after the evaluations that are due, with the best step so far."""
    figures = evaluate(run, state, progress.step, own)
    return (
        progress if own is None else replace(progress, best=own.better(figures, progress.best, progress.step))
    )


def _batches(
    run: RunConfig, state: TrainState, first: int, steps: int, faults: Counter[str]
) -> Iterator[Batch]:
    """The examples of so many steps, micro-batch by micro-batch, from the given one on."""
    config, accelerator = run.optimizer, state.accelerator
    return stream(
        state.recipe.source,
        first=first,
        last=first + max(0, steps) * config.accumulation,
        size=config.batch_size // config.accumulation,
        seed=run.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=run.workers,
        log=_fault_log(run.out, accelerator.process_index),
        unreadable_limit=run.unreadable_limit,
        read_limit=run.read_limit,
        faults=faults,
    )


def _fault_log(out: Path, process: int) -> Path:
    """Where a process names the examples that it could not use."""
    return out / ("unreadable.jsonl" if not process else f"unreadable-{process}.jsonl")


def _key(source: Any, index: int) -> Any:
    """What messages call an example: its key, or its number where the source has no keys."""
    return source.key(index) if hasattr(source, "key") else index


def _seed(seed: int, step: int, accelerator: Any) -> None:
    """Let dropout, and what else draws from the global generator, depend on the step and the process alone.

    So a run that goes on draws the same.
    """
    place = step * accelerator.num_processes + accelerator.process_index
    torch.manual_seed((seed * 0x9E3779B1 + place) % 2**63)


def _gradients(
    state: TrainState, batches: Iterator[Batch], accumulation: int, seen: Observer
) -> tuple[list[int], dict[str, Tensor]]:
    """Add the gradients of a step's batches.

    Returns which examples they had, and the means of their terms.
    """
    indices: list[int] = []
    means: dict[str, Tensor] = {}
    for _ in range(accumulation):
        with seen.phase("data"):
            batch = next(batches)
        indices += batch.indices
        with state.strategy.accumulate(state.model):
            with seen.phase("forward"):
                terms = state.model(batch)
            with seen.phase("backward"):
                state.accelerator.backward(terms["loss"])  # divides by the accumulation
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.detach().float() / accumulation
    return indices, means


def _change_weights(state: TrainState, norm: Tensor) -> None:
    """Take the optimizer's step, unless the gradients' norm is not finite."""
    finite = bool(torch.isfinite(norm))
    # The scaler of fp16 must see infinities to lower its scale.
    if finite or state.accelerator.scaler is not None:
        state.optimizer.step()
    if finite:
        state.ema.step()
    state.optimizer.zero_grad(set_to_none=True)


def _at_fault(accelerator: Any, loss: Tensor) -> bool:
    """Whether a batch is to blame for gradients that are not finite.

    Those of a finite loss are how the scaler of fp16 finds its scale.
    """
    return accelerator.scaler is None or not accelerator.gather(torch.isfinite(loss).view(1)).all()


def _signal_anywhere(accelerator: Any, number: int) -> int:
    """The signal that came to any process, which may be one of them only; 0 for none."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
