"""How the time of a picture falls with the number of pictures drawn at once: a curve for us and one for each peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import BenchScaleConfig
from .contest import OURS, disagreement, median_and_spread, take_turns
from .infer import InferBench


def run_scale(config: BenchScaleConfig) -> dict[str, Any]:
    """Draw with every batch size, all sides in turn; print a table and a JSON line, and write the curves into ``config.out``.

    Raises:
        UserError: the sides' pictures differ by more than ``config.tolerance``.
    """
    names = (*config.peers, OURS)
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
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
                seconds[name][batch] = median_and_spread([run[name] for run in runs])[0] / batch
    print(f"{'pictures at once':<17}" + "".join(f"{name + ', s each':>24}" for name in names) + f"{'ratio':>8}")
    for batch in config.batches:
        times = "".join(f"{seconds[name][batch]:>24.3f}" for name in names)
        print(f"{batch:<17}{times}{seconds[names[0]][batch] / seconds[OURS][batch]:>8.2f}")
    figures = {
        "seconds_per_picture": {name: {str(k): round(v, 4) for k, v in curve.items()} for name, curve in seconds.items()},
        "ratio": {str(k): round(seconds[names[0]][k] / seconds[OURS][k], 4) for k in config.batches},
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "scale.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw_curves(seconds, config.out / "scale.png")
    print(config.out / "scale.png")
    print(json.dumps(figures))
    return figures


def draw_curves(seconds: dict[str, dict[int, float]], path: Path) -> None:
    """Pictures per second by batch size, a curve each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in seconds.items():
        axes.plot(list(curve), [1 / value for value in curve.values()], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pictures at once")
    axes.set_ylabel("pictures per second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
