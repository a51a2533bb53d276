"""``evaluate`` and ``bench``: figures and reports."""

from __future__ import annotations

import argparse
from typing import Any

from .quiet import quiet


def add_commands(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="score a model with the independent judge and write a report")
    evaluate.add_argument("config", help="YAML file, such as configs/emoji/evaluate.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser("bench", help="measure us beside a peer: time, memory, operations, equal results")
    bench.add_argument("kind", choices=("infer", "train", "load"))
    bench.add_argument("config", help="YAML file, such as configs/bench/infer_64.yaml")
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.set_defaults(run=_bench)


def _evaluate(options: argparse.Namespace) -> None:
    from ..config import EvaluateConfig, read_config

    config = read_config(options.config, options.overrides, EvaluateConfig)
    quiet()
    if config.plugins is not None:
        from ..evaluate.combinations import evaluate_combinations

        evaluate_combinations(config, config.plugins)
    elif config.modes:
        from ..evaluate.modes import evaluate_modes

        evaluate_modes(config, config.modes)
    else:
        from ..evaluate.report import evaluate

        evaluate(config)


def _bench(options: argparse.Namespace) -> None:
    from ..config import BENCHES, read_config

    config = read_config(options.config, options.overrides, BENCHES[options.kind])
    quiet()
    from ..bench.run import run_bench

    run_bench(config)
