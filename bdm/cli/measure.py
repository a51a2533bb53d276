"""``evaluate``, ``bench`` and ``memory``: figures and reports."""

from __future__ import annotations

import argparse
from typing import Any

from ..extras import require_packages
from .quiet import quiet


def add_commands(commands: Any) -> None:
    """Add ``evaluate``, ``bench`` and ``memory`` to a parser's commands."""
    evaluate = commands.add_parser(
        "evaluate", help="score a model with the independent judge and write a report"
    )
    evaluate.add_argument("config", help="YAML file, such as configs/emoji/evaluate.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=20")
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser(
        "bench", help="measure us beside a peer: time, memory, operations, equal results"
    )
    bench.add_argument(
        "kind",
        choices=("infer", "decode", "scale", "train", "load", "data", "states", "serve", "gpu"),
        help="what is run beside a peer",
    )
    bench.add_argument("config", help="YAML file, such as configs/bench/infer_64.yaml")
    bench.add_argument("overrides", nargs="*", metavar="key=value", help="such as pairs=3")
    bench.set_defaults(run=_bench)

    memory = commands.add_parser(
        "memory", help="GPU memory that drawing takes under each low-memory setting, without a GPU"
    )
    _memory_options(memory)
    memory.set_defaults(run=_memory)


def _memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=512, help="in pixels (default 512)")
    parser.add_argument("--height", type=int, default=512, help="in pixels (default 512)")
    parser.add_argument("--count", type=int, default=1, help="pictures at once (default 1)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="of all weights (default fp16)"
    )
    parser.add_argument(
        "--backbone", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="file, folder or hub name"
    )
    parser.add_argument(
        "--native-text-encoder",
        default="OFA-Sys/chinese-clip-vit-huge-patch14",
        help="folder, cn_clip file or hub name",
    )


def _evaluate(options: argparse.Namespace) -> None:
    require_packages("bdm evaluate")
    from ..config import FilterConfig, PromptsConfig, RoutesConfig, read_evaluation

    config = read_evaluation(options.config, options.overrides)
    quiet()
    if isinstance(config, PromptsConfig):
        from ..evaluate.prompts import evaluate_prompts

        evaluate_prompts(config)
    elif isinstance(config, RoutesConfig):
        from ..evaluate.routes import evaluate_routes

        evaluate_routes(config)
    elif isinstance(config, FilterConfig):
        from ..evaluate.filtering import evaluate_filter

        evaluate_filter(config)
    elif config.demo is not None:
        from ..evaluate.demo import draw_demo

        draw_demo(config, config.demo)
    elif config.ablation:
        from ..evaluate.ablation import evaluate_ablation

        evaluate_ablation(config, config.ablation)
    elif config.slider:
        from ..evaluate.world_slider import evaluate_slider

        evaluate_slider(config, config.slider)
    elif config.plugins is not None:
        from ..evaluate.plugins import evaluate_combinations

        evaluate_combinations(config, config.plugins)
    elif config.languages:
        from ..evaluate.languages import evaluate_languages

        evaluate_languages(config, config.languages)
    elif config.modes:
        from ..evaluate.modes import evaluate_modes

        evaluate_modes(config, config.modes)
    else:
        from ..evaluate.report import evaluate

        evaluate(config)


def _bench(options: argparse.Namespace) -> None:
    require_packages("bdm bench")
    from ..config import BENCHES, BenchGpuConfig, read_config

    if options.kind == "gpu":
        from ..bench.gpu import run_gpu

        run_gpu(read_config(options.config, options.overrides, BenchGpuConfig))
        return
    config = read_config(options.config, options.overrides, BENCHES[options.kind])
    quiet()
    from ..bench.run import run_bench

    run_bench(config)


def _memory(options: argparse.Namespace) -> None:
    from ..formats.weights import DTYPES
    from ..plan.drawing_memory import drawing_memory, memory_table

    quiet()
    settings = drawing_memory(
        options.backbone,
        options.native_text_encoder,
        options.height,
        options.width,
        options.count,
        DTYPES[options.dtype],
    )
    print(memory_table(settings))
