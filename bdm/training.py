"""The training loop. It knows nothing of what it trains: a recipe brings the parts, the data and the loss."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .averaging import AveragedWeights
from .config import OptimizerConfig, RunConfig
from .data.batch import stream
from .errors import UserError
from .grid import save_picture
from .recipes.base import Recipe


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then constant or a half cosine to zero. ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


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
        return _train(run, recipe, command, stop)


def _train(run: RunConfig, recipe: Recipe, command: str, stop: StopSignal) -> Path:
    config = run.optimizer
    accelerator = Accelerator(
        gradient_accumulation_steps=1, mixed_precision=config.mixed_precision, step_scheduler_with_optimizer=False
    )
    processes = accelerator.num_processes
    micro, rest = divmod(config.batch_size, processes * config.accumulation)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {processes} processes x {config.accumulation} "
            "accumulation steps; make it divisible"
        )
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    # Ready: every part trains, everything else is frozen.
    recipe.requires_grad_(False)
    parts = recipe.parts()
    for part in parts.values():
        part.requires_grad_(True).train()
    recipe.to(accelerator.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    recipe.prepare(accelerator)
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    ema = AveragedWeights(parameters, config.ema_decay)
    model, optimizer = accelerator.prepare(recipe, optimizer)
    if config.compile:
        for part in parts.values():
            part.compile(dynamic=False)
    first = _resume(run, parts, optimizer, ema)
    batches = stream(
        recipe.source, first * config.accumulation, config.steps * config.accumulation, micro * processes, run.seed,
        accelerator.process_index, processes, run.workers, run.out / "unreadable.jsonl", run.unreadable_limit,
    )  # fmt: skip
    skipped = SkippedSteps(run.out, run.skip_limit)
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not accelerator.is_main_process, mininterval=2)
    averages: dict[str, Tensor] = {}
    clock, logged = time.perf_counter(), first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        # Dropout and whatever else draws from the global generator depends on the step alone, so a resume draws the same.
        torch.manual_seed((run.seed * 0x9E3779B1 + step * processes + accelerator.process_index) % 2**63)
        indices: list[int] = []
        for _ in range(config.accumulation):
            batch = next(batches)
            indices += batch.indices
            terms = model(batch)
            accelerator.backward(terms["loss"] / config.accumulation)
            for name, value in terms.items():
                # Kept as tensors: reading a number would make the processor wait for the accelerator in every step.
                averages[name] = averages.get(name, 0.0) + value.detach() / config.accumulation
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        finite = bool(torch.isfinite(norm)) if norm is not None else True
        if finite or config.mixed_precision == "fp16":  # the fp16 scaler must see infinities to lower its scale
            optimizer.step()
        if finite:
            ema.step()
        else:
            skipped.add(step, indices)
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        done = step + 1
        halt = _any_process(accelerator, stop.requested)
        if accelerator.is_main_process:
            if done % run.log_every == 0:
                # Fewer steps than log_every where the run was resumed in between.
                count, logged = done - logged, done
                row = {name: value.item() / count for name, value in averages.items()}
                averages.clear()
                now = time.perf_counter()
                speed = {"seconds": now - clock, "samples_per_second": count * config.batch_size / (now - clock)}
                _log(run.out, {"step": done, **row, "lr": learning_rate(step, config), **speed})
                clock = now
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            due = [every for every in (run.validate_every, run.grid_every, run.checkpoint_every) if done % every == 0]
            if (due or done == config.steps) and not halt:
                _look(run, recipe, ema, done)
            if done % run.checkpoint_every == 0 or done == config.steps or halt:
                _save(run, parts, optimizer, ema, done)
        if halt:
            bar.close()
            raise Stopped(stop.number, done)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(run, recipe, ema, command)
    accelerator.wait_for_everyone()
    return run.out / "model"


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (pre-emption), so that the loop can save its state after the step it is in."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Only the main thread may set handlers, and Windows has no SIGUSR1.
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.number = number

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number != 0


class Stopped(Exception):
    """A signal ended the run; its state is saved.

    Attributes:
        number: of the signal.
        step: steps done.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}; the state is saved, the same command goes on")
        self.number, self.step = number, step


class SkippedSteps:
    """Counts steps whose gradients are not finite, and writes down which examples they had."""

    def __init__(self, out: Path, limit: int) -> None:
        self.out, self.limit, self.count = out, limit, 0

    def add(self, step: int, indices: list[int]) -> None:
        """Note a step that was left out.

        Raises:
            UserError: there are more than ``limit``.
        """
        self.count += 1
        with open(self.out / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, "examples": indices}) + "\n")
        if self.count > self.limit:
            raise UserError(
                f"{self.count} steps had gradients that are not finite, the last at step {step + 1}; their examples are in "
                f"{self.out / 'skipped.jsonl'}: look at them, lower the learning rate, or raise skip_limit ({self.limit})"
            )


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process: a signal may reach one of them only."""
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.item() > 0


def _look(run: RunConfig, recipe: Recipe, ema: AveragedWeights, done: int) -> None:
    """Validation losses and the sample grid, with the averaged weights."""
    recipe.eval()
    # Looking takes other batch sizes than training, and compiling for each would take longer than the look.
    with ema.applied(), torch.compiler.set_stance("force_eager"):
        if done % run.validate_every == 0 or done == run.optimizer.steps:
            _log(run.out, {"step": done, **{f"validation/{k}": v for k, v in recipe.validate().items()}})
            plot_metrics(run.out)
        if done % run.grid_every == 0 or done == run.optimizer.steps:
            picture = recipe.grid()
            if picture is not None:
                save_picture(picture, run.out / "grids" / f"{done:07d}.png")
    recipe.train()


def _save(run: RunConfig, parts: dict[str, nn.Module], optimizer: Any, ema: AveragedWeights, done: int) -> None:
    state = {
        "step": done,
        "run": _meaning(run),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
    }
    checkpoint.save_state(run.out / "states", done, state, run.keep_last, run.keep_every)


def _resume(run: RunConfig, parts: dict[str, nn.Module], optimizer: Any, ema: AveragedWeights) -> int:
    state = checkpoint.load_state(run.out / "states")
    if state is None:
        return 0
    if changes := _differences(json.loads(state["run"]), json.loads(_meaning(run))):
        raise UserError(
            f"{run.out} holds a run with another configuration, and going on would mix the two ({'; '.join(changes)}); "
            "choose another out=, set the values back, or delete the folder"
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]


def _meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as JSON."""
    ignored = {
        "out", "threads", "workers", "log_every", "validate_every", "grid_every", "checkpoint_every", "keep_last", "keep_every",
        "skip_limit", "unreadable_limit",
    }  # fmt: skip
    return run.model_dump_json(exclude=ignored)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two configurations: "optimizer.steps: 100 -> 200"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def _publish(run: RunConfig, recipe: Recipe, ema: AveragedWeights, command: str) -> None:
    """Save the averaged weights as the finished model, with a card that says how they came about."""
    recipe.eval()
    partial = run.out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with ema.applied():
        recipe.save(partial)
    losses = [row for row in read_metrics(run.out) if "loss" in row]
    validation = [{k: v for k, v in row.items() if k != "step"} for row in read_metrics(run.out) if "loss" not in row]
    card = {
        "command": command,
        "seed": run.seed,
        "steps": run.optimizer.steps,
        "seconds": round(sum(row["seconds"] for row in losses)),
        "threads": torch.get_num_threads(),
        "final_loss": losses[-1]["loss"] if losses else None,
        "validation": validation[-1] if validation else {},
        "torch": torch.__version__,
    }
    checkpoint.write_json(partial / "card.json", card)
    checkpoint.publish_folder(partial, run.out / "model")


def _log(out: Path, row: dict[str, float]) -> None:
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``; of steps done twice (after a resume) the last counts."""
    rows: dict[tuple[float, bool], dict[str, float]] = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["step"], "loss" in row] = row
    return [rows[key] for key in sorted(rows)]


def plot_metrics(out: Path) -> None:
    """Draw the losses of a run into ``loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(out)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = dict.fromkeys(k for row in rows for k in row if k == "loss" or k.startswith("validation/"))
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 40 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)
