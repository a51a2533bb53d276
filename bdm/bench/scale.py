"""How the time of a picture falls with the number of pictures drawn at once.

A curve for us and one for each peer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import BenchScaleConfig
from ..extras import require_packages
from .compare import OURS, disagreement, median_and_spread, take_turns
from .infer import InferBench

#: Seconds a picture by the number of pictures drawn at once, for each side.
Curves = dict[str, dict[int, float]]


def time_curves(config: BenchScaleConfig) -> Curves:
    """Draw with every batch size, all sides in turn; gives the median.

    Raises:
        UserError: the sides' pictures differ by more than ``config.tolerance``.
    """
    names = (*config.peers, OURS)
    curves: Curves = {name: {} for name in names}
    with tqdm(total=len(config.batches) * config.pairs * len(names), desc="drawing", unit="call") as bar:
        for batch in config.batches:
            bench = InferBench(config.model_copy(update={"batch": batch}))
            sides = {name: bench.side(name, count=False) for name in names}
            disagreement(sides, config.tolerance)  # warms up, too
            runs = []
            for run in take_turns(sides, config.pairs):
                runs.append(run)
                bar.update(len(names))
            for name in names:
                curves[name][batch] = median_and_spread([run[name] for run in runs])[0] / batch
    return curves


def ratios(curves: Curves) -> dict[int, float]:
    """The first peer's time over ours, by batch size."""
    peer = next(iter(curves.values()))
    return {batch: peer[batch] / ours for batch, ours in curves[OURS].items()}


def table(curves: Curves) -> str:
    """A line for each batch size: seconds a picture for each side, and the ratio."""
    lines = [
        f"{'pictures at once':<17}" + "".join(f"{name + ', s each':>24}" for name in curves) + f"{'ratio':>8}"
    ]
    for batch, ratio in ratios(curves).items():
        lines.append(
            f"{batch:<17}" + "".join(f"{curve[batch]:>24.3f}" for curve in curves.values()) + f"{ratio:>8.2f}"
        )
    return "\n".join(lines)


def summary(curves: Curves) -> dict[str, Any]:
    """The figures of the JSON line."""
    return {
        "seconds_per_picture": {
            name: {str(k): round(v, 4) for k, v in curve.items()} for name, curve in curves.items()
        },
        "ratio": {str(batch): round(ratio, 4) for batch, ratio in ratios(curves).items()},
    }


def draw_curves(curves: Curves, path: Path) -> None:
    """Pictures per second by batch size, a curve each."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), [1 / value for value in curve.values()], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pictures at once")
    axes.set_ylabel("pictures per second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
