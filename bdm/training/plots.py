"""Charts of a run's figures: ``loss.png``, and ``steps.png`` of what else its steps say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import require_packages
from .metrics import read_metrics

Row = Mapping[str, float]


def plot_metrics(out: Path) -> None:
    """Draw the losses of a run into ``loss.png``, and the rest into ``steps.png``."""
    require_packages("a chart")
    rows = read_metrics(out)
    _plot_losses(rows, out / "loss.png")
    _plot_steps(rows, out / "steps.png")


def _plot_losses(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw(axes, rows, _names(rows, lambda name: name == "loss" or name.startswith("validation/")))
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=110)


def _plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Four panels; those without figures stay empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8))
    figure.subplots_adjust(0.05, 0.05, 0.99, 0.96, 0.1, 0.2)  # a layout that is worked out takes longer
    by_timestep, gradients, seconds, speed = figure.subplots(2, 2).flat
    _draw(by_timestep, rows, _names(rows, lambda name: name.startswith("loss/")))
    by_timestep.set(title="loss by timestep")
    _draw(gradients, rows, _names(rows, lambda name: name.startswith("grad_norm")))
    gradients.set(title="norm of the gradients")
    _stack(seconds, [row for row in rows if "seconds" in row])
    seconds.set(title="share of the time", ylim=(0, 1))
    shares = ("flop_utilisation",)
    _draw(speed, rows, _names(rows, lambda name: name in ("samples_per_second", "memory/allocated", *shares)))
    speed.set(title="speed, memory, utilisation")
    figure.savefig(path, dpi=80)


def _names(rows: Sequence[Row], wanted: Callable[[str], bool]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if wanted(name)))


def _draw(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line for each figure, on a logarithmic scale where that shows all of them."""
    # A contrastive loss goes below zero, which a logarithm does not show.
    positive = all(row[name] > 0 for row in rows for name in names if name in row)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(
            *zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 40 else None
        )
    axes.set_yscale("log" if positive and names else "linear")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize=8)


def _stack(axes: Any, rows: Sequence[Row]) -> None:
    """The phases' shares of each row's time, one on the other; what is left over is none of them."""
    names = _names(rows, lambda name: name.startswith("seconds/"))
    if not names:
        return
    steps = [row["step"] for row in rows]
    shares = [[row.get(name, 0.0) / row["seconds"] for row in rows] for name in names]
    axes.stackplot(steps, *shares, labels=[name.removeprefix("seconds/") for name in names])
    axes.legend(fontsize=8, loc="lower left")
