"""What a run reports: ``metrics.jsonl``, ``loss.png``, sample grids and experiment trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .grid import save_picture


def start_trackers(accelerator: Accelerator, out: Path, settings: dict[str, Any]) -> None:
    """Start the trackers that the accelerator was given; what they write stays in the run folder.

    Args:
        accelerator: made with ``log_with`` and ``out / "trackers"`` as project folder.
        out: the run folder; its name is the run's.
        settings: the run's configuration, nested.
    """
    options = {
        "wandb": {"name": out.name, "dir": str(out)},
        "swanlab": {"experiment_name": out.name, "logdir": str(out / "trackers" / "swanlab")},
    }
    accelerator.init_trackers("bdm", flat_settings(settings), options)


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"optimizer.steps": 100}``; trackers take numbers and texts only."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def log_row(accelerator: Accelerator, out: Path, row: dict[str, Any]) -> None:
    """Add a row, which names its ``step``, to ``metrics.jsonl`` and to the trackers; the main process does."""
    if not accelerator.is_main_process:
        return
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def log_picture(accelerator: Accelerator, out: Path, picture: Image.Image, step: int) -> None:
    """Save a sample grid and show it in the trackers; the main process does."""
    if not accelerator.is_main_process:
        return
    save_picture(picture, out / "grids" / f"{step:07d}.png")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"grid": np.asarray(picture.convert("RGB"))[None]}, step=step, **layout)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``; of steps done twice (after a resume) the last counts."""
    rows: dict[tuple[float, bool], dict[str, float]] = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["step"], "loss" in row] = row
    return [rows[key] for key in sorted(rows)]


def plot_metrics(out: Path) -> None:
    """Draw the losses of a run into ``loss.png``."""
    from matplotlib.figure import Figure

    rows = read_metrics(out)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(k for row in rows for k in row if k == "loss" or k.startswith("validation/"))
    # A contrastive loss goes below zero, which a logarithm does not show.
    positive = all(row[name] > 0 for row in rows for name in names if name in row)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 40 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / "loss.png", dpi=110)
