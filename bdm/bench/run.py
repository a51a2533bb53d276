"""``bdm bench``: from a configuration to a table, a chart and one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import (
    BENCHES,
    BenchConfig,
    BenchDataConfig,
    BenchDecodeConfig,
    BenchInferConfig,
    BenchLoadConfig,
    BenchScaleConfig,
    BenchServeConfig,
    BenchStatesConfig,
    BenchTrainConfig,
)
from ..extras import require_packages
from .compare import OURS, Bench, Outcome, compare, median_and_spread


def bench_of(settings: Mapping[str, Any]) -> Bench:
    """The comparison that a configuration (as a mapping) describes, with its number of threads set."""
    return build_bench(BENCHES[settings["kind"]].model_validate(settings))


def build_bench(config: BenchConfig) -> Bench:
    """The comparison that a configuration describes, with its number of threads set."""
    set_threads(config)
    match config:
        case BenchInferConfig():
            from .infer import InferBench

            return InferBench(config)
        case BenchDecodeConfig():
            from .decode import DecodeBench

            return DecodeBench(config)
        case BenchTrainConfig():
            from .train import TrainBench

            return TrainBench(config)
        case BenchLoadConfig():
            from .load import LoadBench

            return LoadBench(config)
    raise AssertionError(type(config))


def set_threads(config: BenchConfig) -> None:
    """Take as many threads as the configuration says, if it does."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Hold the comparison, print its table and JSON line, and write ``bench.json`` and ``bench.png`` into
    ``config.out``.
    """
    if isinstance(config, BenchDataConfig):
        from . import data

        set_threads(config)
        measured = data.measure(config)
        text, figures, draw = data.table(measured), measured, partial(data.draw_growth, measured)
    elif isinstance(config, BenchStatesConfig):
        from . import states

        set_threads(config)
        measured = states.measure(config)
        text, figures, draw = states.table(measured), measured, partial(states.draw_stalls, measured)
    elif isinstance(config, BenchServeConfig):
        from . import serve

        set_threads(config)
        measured = serve.measure(config)
        text, figures, draw = serve.table(measured), measured, partial(serve.draw_finished, measured)
    elif isinstance(config, BenchScaleConfig):
        from . import scale

        set_threads(config)
        curves = scale.time_curves(config)
        text, figures, draw = scale.table(curves), scale.summary(curves), partial(scale.draw_curves, curves)
    else:
        bench = build_bench(config)
        outcome = compare(bench, config)
        text, figures, draw = table(outcome), summary(bench, outcome), partial(draw_chart, outcome)
    print(text)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "bench.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(config.out / "bench.png")
    print(config.out / "bench.png")
    print(json.dumps(figures))
    return figures


def table(outcome: Outcome) -> str:
    """One line a side: median time and spread, memory, operations, share of the best convolution rate, ratio
    to ours.
    """
    lines = [
        f"{'side':<20} {'seconds (min to max)':>26} {'memory':>9} {'GFLOP':>11} {'of best':>8}"
        f" {'time / ours':>22}"
    ]
    for name, seconds in outcome.seconds.items():
        median, low, high = median_and_spread(seconds)
        flops = outcome.flops[name]
        share = f"{flops / median / outcome.rate:.0%}" if flops and outcome.rate else ""
        counted = "not counted" if flops is None else f"{flops / 1e9:.1f}"
        middle, least, most = median_and_spread(outcome.ratios(name))
        lines.append(
            f"{name:<20} {f'{median:.3f} ({low:.3f} to {high:.3f})':>26} {outcome.memory[name] / 2**30:>5.2f}"
            f" GiB {counted:>11} {share:>8}"
            f" {f'{middle:.3f} ({least:.3f} to {most:.3f})':>22}"
        )
    if outcome.rate:
        lines.append(
            f"best convolution rate measured here: {outcome.rate / 1e9:.0f} GFLOP/s on"
            f" {torch.get_num_threads()} threads"
        )
    return "\n".join(lines)


def summary(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """The figures of the JSON line; ``ratio`` is the first peer's time over ours, the median of the pairs."""
    first = bench.peers[0]
    medians = {peer: round(median_and_spread(outcome.ratios(peer))[0], 4) for peer in bench.peers}
    return {
        "ratio": medians[first],
        "pairs": [round(ratio, 4) for ratio in outcome.ratios(first)],
        "peak_memory_ratio": round(outcome.memory[OURS] / outcome.memory[first], 4),
        "max_relative_error": outcome.error,
        "ratios": medians,
        "peak_memory_ratios": {
            peer: round(outcome.memory[OURS] / outcome.memory[peer], 4) for peer in bench.peers
        },
        "seconds": {
            name: round(median_and_spread(seconds)[0], 4) for name, seconds in outcome.seconds.items()
        },
        "gflop": {name: flops and round(flops / 1e9, 1) for name, flops in outcome.flops.items()},
        "threads": torch.get_num_threads(),
    }


def draw_chart(outcome: Outcome, path: Path) -> None:
    """Bars of time (with spread) and peak memory, a side each."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    names = list(outcome.seconds)
    figure = Figure(figsize=(8, 0.6 * len(names) + 1.4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    colours = ["tab:blue" if name == OURS else "tab:gray" for name in names]
    spreads = [median_and_spread(outcome.seconds[name]) for name in names]
    errors = [[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]]
    time_axes.barh(names, [m for m, _, _ in spreads], xerr=errors, color=colours, capsize=3)
    time_axes.set_xlabel("seconds (median, smallest to largest)")
    memory_axes.barh(names, [outcome.memory[name] / 2**30 for name in names], color=colours)
    memory_axes.set_xlabel("peak memory (GiB)")
    figure.savefig(path, dpi=120)
