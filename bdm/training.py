"""The training loop. It knows nothing of what it trains: a recipe brings the parts, the data and the loss."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
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
    """
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
        accelerator.process_index, processes, run.workers,
    )  # fmt: skip
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not accelerator.is_main_process, mininterval=2)
    averages: dict[str, float] = {}
    clock, logged = time.perf_counter(), first
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        for _ in range(config.accumulation):
            terms = model(next(batches))
            accelerator.backward(terms["loss"] / config.accumulation)
            for name, value in terms.items():
                averages[name] = averages.get(name, 0.0) + value.item() / config.accumulation
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step()
        bar.update()
        done = step + 1
        if not accelerator.is_main_process:
            continue
        if done % run.log_every == 0:
            # Fewer steps than log_every where the run was resumed in between.
            count, logged = done - logged, done
            row = {name: value / count for name, value in averages.items()}
            averages.clear()
            now = time.perf_counter()
            speed = {"seconds": now - clock, "samples_per_second": count * config.batch_size / (now - clock)}
            _log(run.out, {"step": done, **row, "lr": learning_rate(step, config), **speed})
            clock = now
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        due = [every for every in (run.validate_every, run.grid_every, run.checkpoint_every) if done % every == 0]
        if due or done == config.steps:
            _look(run, recipe, ema, done)
            if done % run.checkpoint_every == 0 or done == config.steps:
                _save(run, parts, optimizer, ema, done)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(run, recipe, ema, command)
    accelerator.wait_for_everyone()
    return run.out / "model"


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
    checkpoint.save_state(
        run.out / "state.pt",
        {
            "step": done,
            "run": _meaning(run),
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
        },
    )


def _resume(run: RunConfig, parts: dict[str, nn.Module], optimizer: Any, ema: AveragedWeights) -> int:
    path = run.out / "state.pt"
    if not path.exists():
        return 0
    state = checkpoint.load_state(path)
    if state["run"] != _meaning(run):
        raise UserError(f"{run.out} holds a run with another configuration; choose another out= or delete the folder")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]


def _meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as text."""
    ignored = {"out", "threads", "workers", "log_every", "validate_every", "grid_every", "checkpoint_every"}
    return run.model_dump_json(exclude=ignored)


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
