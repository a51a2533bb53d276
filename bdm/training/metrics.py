"""What a run reports: ``metrics.jsonl``, ``loss.png``, sample grids and experiment trackers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import RunConfig
from ..data.faults import KINDS as FAULT_KINDS
from ..drawing.grid import save_picture
from ..extras import require_packages
from ..files import append_line

logger = logging.getLogger("bdm")


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


class RunningMeans:
    """Means of scalars over steps and processes.

    Sums stay on the device, so that the processor waits for it only when a row is taken.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count a step's scalars in."""
        self._count += 1
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, nothing where no step was counted; they start anew."""
        if not self._count:
            return {}
        values: Any = accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
        row = dict(zip(self._sums, (values / self._count).tolist(), strict=True))
        self._sums, self._count = {}, 0
        return row


class StepLog:
    """Figures of a run's steps: a bar for people, and rows with the means of ``log_every`` steps.

    Args:
        run: the configuration.
        accelerator: joins the processes.
        first: steps done before.
    """

    def __init__(self, run: RunConfig, accelerator: Accelerator, first: int) -> None:
        self._run, self._accelerator = run, accelerator
        self._means = RunningMeans()
        self._logged, self._clock = first, time.perf_counter()
        quiet = not accelerator.is_main_process
        self._bar = tqdm(total=run.optimizer.steps, initial=first, unit="step", disable=quiet, mininterval=2)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count in what a step said of itself."""
        self._means.add(terms)

    def step(self, done: int, rate: float, faults: Mapping[str, int] = {}) -> None:
        """Note that a step is done, with its learning rate; write a row where one is due.

        Args:
            done: steps done.
            rate: the learning rate.
            faults: of this process's examples so far, by kind; the row has the sums over the processes.
        """
        self._bar.update()
        if done % self._run.log_every:
            return
        means, seconds = self._means.take(self._accelerator), time.perf_counter() - self._clock
        # Fewer steps than log_every where the run was resumed in between.
        samples = (done - self._logged) * self._run.optimizer.batch_size
        speed = {"seconds": seconds, "samples_per_second": samples / seconds}
        lost = _summed(self._accelerator, faults)
        log_row(self._accelerator, self._run.out, {"step": done, **means, "lr": rate, **speed, **lost})
        self._logged, self._clock = done, self._clock + seconds
        if "loss" in means:
            self._bar.set_postfix({"loss": f"{means['loss']:.4f}"}, refresh=False)

    def close(self) -> None:
        """There are no more steps."""
        self._bar.close()


def _summed(accelerator: Accelerator, faults: Mapping[str, int]) -> dict[str, int]:
    """Faults of all processes, by kind; kinds that did not occur are left out."""
    own = torch.tensor([faults.get(kind, 0) for kind in FAULT_KINDS], device=accelerator.device)
    total: Any = accelerator.reduce(own, "sum")
    return {f"faults/{k}": n for k, n in zip(FAULT_KINDS, total.tolist(), strict=True) if n}


def log_row(accelerator: Accelerator, out: Path, row: dict[str, Any]) -> None:
    """Add a row, which names its ``step``, to ``metrics.jsonl`` and to the trackers.

    The main process does.
    """
    if not accelerator.is_main_process:
        return
    append_line(
        out / "metrics.jsonl", {k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}
    )
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
    """The rows of a run's ``metrics.jsonl``, none before there are any.

    Of steps done twice (after a resume) the last counts.
    """
    rows: dict[tuple[float, bool], dict[str, float]] = {}
    path = out / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with suppress(ValueError):  # half a line, where the disk was full
            row = json.loads(line)
            rows[row["step"], "seconds" in row] = row
    return [rows[key] for key in sorted(rows)]


def plot_metrics(out: Path) -> None:
    """Draw the losses of a run into ``loss.png``."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    rows = read_metrics(out)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(k for row in rows for k in row if k == "loss" or k.startswith("validation/"))
    # A contrastive loss goes below zero, which a logarithm does not show.
    positive = all(row[name] > 0 for row in rows for name in names if name in row)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(
            *zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 40 else None
        )
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / "loss.png", dpi=110)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Note in the log how long the ``with`` block took."""
    start = time.perf_counter()
    yield
    logger.info("%s: %.2f s", what, time.perf_counter() - start)
