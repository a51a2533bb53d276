"""What a run reports: ``metrics.jsonl``, ``loss.png``, sample grids and experiment trackers."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from string import ascii_lowercase, digits
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
from ..files import append_line, write_text, writing_to
from .observing import Observer

logger = logging.getLogger("bdm")


def start_trackers(accelerator: Accelerator, out: Path, settings: dict[str, Any], step: int = 0) -> None:
    """Start the trackers that the accelerator was given; what they write stays in the run folder.

    A run that goes on is the same run for them, and what they have of later steps is taken back.

    Args:
        accelerator: made with ``log_with`` and ``out / "trackers"`` as project folder.
        out: the run folder; its name is the run's.
        settings: the run's configuration, nested.
        step: steps done.
    """
    if not accelerator.log_with:
        return
    same = {"id": _tracker_id(out), "resume": "allow"} if accelerator.is_main_process else {}
    options = {
        "wandb": {"name": out.name, "dir": str(out), **same},
        "swanlab": {"experiment_name": out.name, "logdir": str(out / "trackers" / "swanlab"), **same},
        "tensorboard": {"purge_step": step + 1} if step else {},
    }
    accelerator.init_trackers("bdm", flat_settings(settings), options)


def _tracker_id(out: Path) -> str:
    """What a run is called by its trackers whenever it goes on."""
    path = out / "trackers" / "id"
    if not path.is_file():
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # SwanLab's are 21 small letters and digits.
            write_text(path, "".join(secrets.choice(ascii_lowercase + digits) for _ in range(21)))
    return path.read_text(encoding="utf-8").strip()


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

    What is a sum and a count (see ``bdm.training.recipes.terms``) is divided by its own count. Sums stay on
    the device, so that the processor waits for it only when a row is taken.
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
        counted = torch.tensor(float(self._count))
        pairs = [
            value if value.ndim else torch.stack([value, counted.to(value)]) for value in self._sums.values()
        ]
        joined: Any = accelerator.reduce(torch.stack(pairs), "mean")
        rows = zip(self._sums, joined.tolist(), strict=True)
        self._sums, self._count = {}, 0
        return {name: total / count for name, (total, count) in rows if count}


class StepLog:
    """Figures of a run's steps: a bar for people, and rows with the means of ``log_every`` steps.

    Args:
        run: the configuration.
        accelerator: joins the processes.
        first: steps done before.
        observers: they add their figures.
    """

    def __init__(
        self, run: RunConfig, accelerator: Accelerator, first: int, observers: Observer | None = None
    ) -> None:
        self._run, self._accelerator = run, accelerator
        self._observers = observers or Observer()
        self._means = RunningMeans()
        self._logged, self._clock = first, time.perf_counter()
        quiet = not accelerator.is_main_process
        self._bar = tqdm(total=run.optimizer.steps, initial=first, unit="step", disable=quiet, mininterval=2)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count in what a step said of itself."""
        self._means.add(terms)

    def due(self, done: int) -> bool:
        """Whether a row is written after so many steps."""
        return not done % self._run.log_every

    def step(self, done: int, rate: float, faults: Mapping[str, int] = {}) -> None:
        """Note that a step is done, with its learning rate; write a row where one is due.

        Args:
            done: steps done.
            rate: the learning rate.
            faults: of this process's examples so far, by kind; the row has the sums over the processes.
        """
        self._bar.update()
        if not self.due(done):
            return
        means, seconds = self._means.take(self._accelerator), time.perf_counter() - self._clock
        # Fewer steps than log_every where the run was resumed in between.
        samples = (done - self._logged) * self._run.optimizer.batch_size
        speed = {"seconds": seconds, "samples_per_second": samples / seconds}
        seen = self._observers.figures(done - self._logged, seconds)
        lost = _summed(self._accelerator, faults)
        row = {"step": done, **means, "lr": rate, **speed, **seen, **lost}
        log_row(self._accelerator, self._run.out, row)
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


def log_picture(accelerator: Accelerator, out: Path, picture: Image.Image, step: int, name: str = "") -> None:
    """Save a sample grid, or one of another name, and show it in the trackers; the main process does."""
    if not accelerator.is_main_process:
        return
    save_picture(picture, out / "grids" / f"{name}{'-' * bool(name)}{step:07d}.png")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name or "grid": np.asarray(picture.convert("RGB"))[None]}, step=step, **layout)


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


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Note in the log how long the ``with`` block took."""
    start = time.perf_counter()
    yield
    logger.info("%s: %.2f s", what, time.perf_counter() - start)
