"""What approximate modes cost in accuracy and save in time, each beside the exact picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluateConfig, ModeConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..models.samplers import other_sampler
from ..speed.approximate import Approximation
from .setup import open_evaluation, write_result
from .trials import Trial, draw, make_trials, score

#: The mode that the others are compared with.
EXACT_NAME = "exact"

#: What a mode's LoRA is called while it is attached.
PLUGIN = "mode"

#: How often every mode draws the batch that is timed.
ROUNDS = 5


@dataclass(frozen=True)
class ModeResult:
    """What a mode gave: accuracies, and the exact mode's time over its own, round by round."""

    concept: float
    pairs: float
    speedups: list[float]


def evaluate_modes(config: EvaluateConfig, modes: Mapping[str, ModeConfig]) -> dict[str, Any]:
    """Score and time every mode; writes ``report.md``, ``result.json`` and ``grid.png`` into ``config.out``.

    The times are those of one batch, all modes in turn, so that a machine that slows down favours none.

    Returns:
        What is printed: a row for each mode.
    """
    opened = open_evaluation(config)
    pipe = opened.pipe
    whole = ModeConfig(steps=config.steps, guidance=config.guidance)
    every = {EXACT_NAME: whole} | {name: _completed(mode, whole) for name, mode in modes.items()}
    trials = {trial.name: trial for trial in make_trials(opened.world, config.controls, config.seed)}
    shown: dict[str, Tensor] = {}
    accuracy: dict[str, tuple[float, float]] = {}
    for mode in every.values():  # what cannot be loaded is said before anything is drawn
        with in_mode(pipe, mode):
            pass
    for name, mode in every.items():
        pictures, figures = {}, {}
        with in_mode(pipe, mode) as drawn:
            for trial in (trials["chinese"], trials["trained_pairs"]):
                pictures[trial.name] = drawn(trial, config.batch, config.seed)
                figures[trial.name] = score(opened.judge, pictures[trial.name], trial)
        shown[name] = pictures["chinese"]
        pairs = figures["trained_pairs"].both
        assert pairs is not None
        accuracy[name] = (figures["chinese"].concept.value, pairs.value)
    seconds = time_modes(pipe, every, trials["chinese"], config.batch, config.seed)
    results = {
        name: ModeResult(
            *accuracy[name], [a / b for a, b in zip(seconds[EXACT_NAME], seconds[name], strict=True)]
        )
        for name in every
    }
    rows = {
        name: {
            "chinese_top1": round(result.concept, 4),
            "trained_pairs": round(result.pairs, 4),
            "speedup": round(statistics.median(result.speedups), 3),
            "speedups": [round(value, 3) for value in result.speedups],
        }
        for name, result in results.items()
    }
    save_picture(_grid(trials["chinese"], shown), config.out / "grid.png")
    write_result(config.out, {"modes": rows}, _report(config, every, results))
    return rows


def _completed(mode: ModeConfig, exact: ModeConfig) -> ModeConfig:
    """A mode with what it does not say taken from the exact one."""
    return mode.model_copy(
        update={key: getattr(exact, key) for key in ("steps", "guidance") if getattr(mode, key) is None}
    )


@contextmanager
def in_mode(pipe: Any, mode: ModeConfig) -> Iterator[Callable[[Trial, int, int], Tensor]]:
    """Inside the ``with`` block the pipeline has a mode's sampler and LoRA.

    Yields what draws a trial: (trial, batch, seed).

    Raises:
        UserError: an unknown sampler, or a file that is no adapter.
    """
    scheduler = pipe.scheduler
    approximation = Approximation(*mode.guidance_interval, mode.branch_every, mode.deep_every)

    def drawn(trial: Trial, batch: int, seed: int) -> Tensor:
        assert mode.steps is not None
        assert mode.guidance is not None
        return draw(pipe, trial, mode.steps, mode.guidance, batch, seed, approximation=approximation)

    try:
        if mode.sampler:
            pipe.scheduler = other_sampler(mode.sampler, scheduler)
        if mode.lora:
            pipe.plugins.attach(mode.lora, PLUGIN, kind="adapter")
        yield drawn
    finally:
        pipe.scheduler = scheduler
        if PLUGIN in pipe.plugins:
            pipe.plugins.detach(PLUGIN)


def time_modes(
    pipe: Any, modes: Mapping[str, ModeConfig], trial: Trial, batch: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of drawing one batch, all modes in turn; the first round warms up and does not count."""
    part = Trial("time", trial.title, trial.native[:batch], trial.english[:batch], trial.concepts[:batch])
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(ROUNDS + 1):
        for name, mode in modes.items():
            with in_mode(pipe, mode) as drawn:
                start = time.perf_counter()
                drawn(part, batch, seed)
                seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _grid(trial: Trial, shown: Mapping[str, Tensor], count: int = 8) -> Any:
    """Rows prompts, columns modes."""
    chosen = range(0, len(trial.native), max(1, len(trial.native) // count))
    pictures = torch.stack([shown[name][i] for i in chosen for name in shown])
    return labelled_grid(
        to_pixels(pictures),
        [f"{trial.native[i]} {name}" for i in chosen for name in shown],
        len(shown),
        scale=3,
    )


def _report(
    config: EvaluateConfig, modes: Mapping[str, ModeConfig], results: Mapping[str, ModeResult]
) -> str:
    lines = [
        "# Approximate modes",
        "",
        (
            f"Model `{config.model}`, judge `{config.judge}`, batches of {config.batch}, seed {config.seed}."
            f" Speed: time of the exact mode over the mode's own, drawn in turn, median of {ROUNDS} rounds"
            " (smallest to largest)."
        ),
        "",
        "| mode | steps | guidance | speed | Chinese top-1 | trained pairs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        mode, speeds = modes[name], result.speedups
        speed = f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
        lines.append(
            f"| {name} | {mode.steps} | {mode.guidance:g} | {speed} | {result.concept:.3f} |"
            f" {result.pairs:.3f} |"
        )
    return "\n".join([*lines, "", "![rows prompts, columns modes](grid.png)", ""])
