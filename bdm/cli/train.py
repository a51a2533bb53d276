"""``train``, ``prepare``, ``vocabulary`` and ``plan``: what runs before and while a model is trained."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..extras import require_packages
from .quiet import quiet


def add_commands(commands: Any) -> None:
    """Add ``train``, ``prepare``, ``vocabulary`` and ``plan`` to a parser's commands."""
    train = commands.add_parser("train", help="train what a configuration describes")
    train.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.steps=100")
    train.add_argument(
        "--check", action="store_true", help="check and print the resolved configuration, then stop"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="one batch, one step, one save and one grid in a folder that is deleted",
    )
    train.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAMES",
        help="settings in which a run may differ from its last state, such as optimizer.steps,data.urls",
    )
    train.set_defaults(run=_train)

    prepare = commands.add_parser(
        "prepare", help="raw pictures -> shards of moments and text features to train from"
    )
    prepare.add_argument("config", help="YAML file, such as configs/emoji/prepare.yaml")
    prepare.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.urls=/data/*.tar")
    prepare.add_argument(
        "--engine", choices=("accelerate", "ray"), default="accelerate", help="who shares out the shards"
    )
    prepare.add_argument(
        "--check", action="store_true", help="check and print the resolved configuration, then stop"
    )
    prepare.set_defaults(run=_prepare)

    vocabulary = commands.add_parser(
        "vocabulary", help="training captions -> a SentencePiece vocabulary, with a report beside CLIP's"
    )
    vocabulary.add_argument("config", help="YAML file, such as configs/routes/vocabulary_ja.yaml")
    vocabulary.add_argument("overrides", nargs="*", metavar="key=value", help="such as pieces=4000")
    vocabulary.add_argument(
        "--check", action="store_true", help="check and print the resolved configuration, then stop"
    )
    vocabulary.set_defaults(run=_vocabulary)

    plan = commands.add_parser(
        "plan", help="memory, time, cost and disk of a run, without its weights, its data or a GPU"
    )
    plan.add_argument("config", help="YAML file, such as configs/sd15_chinese_clip.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.accumulation=10")
    _plan_options(plan)
    plan.set_defaults(run=_plan)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share a step (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each (default 80)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=312.0, metavar="X",
        help="dense rate of each at the precision in use (default 312, an A100 or A800 in bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of that rate that training reaches (default 0.4)",
    )
    parser.add_argument("--price-per-hour", type=float, default=0.0, metavar="PRICE", help="of one GPU")
    parser.add_argument(
        "--samples",
        type=int,
        default=None,
        metavar="N",
        help="size of the corpus (default: counted in the data)",
    )


def _train(options: argparse.Namespace) -> None:
    require_packages("bdm train")
    import yaml

    from ..config import RunConfig, read_config

    run = read_config(options.config, options.overrides, RunConfig)
    text = yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process:
        print(text)
    if options.check:
        return
    require_packages(run.optimizer.name, *run.trackers)
    from ..training.loop import Stopped, train
    from ..training.recipes.build import build_recipe

    quiet()
    if options.dry_run:
        _dry_run(run)
        return
    observers = _observers(run)
    recipe = build_recipe(run)
    allow = [name for names in options.allow for name in names.split(",") if name]
    allowed = ["--allow", ",".join(allow)] if allow else []
    command = " ".join(["python train.py", options.config, *options.overrides, *allowed])
    try:
        model = train(run, recipe, command, allow, observers)
        if main_process:
            print(model)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        # What a shell reports for a process that a signal ended: schedulers see that it did not finish.
        sys.exit(128 + stopped.number)


def _observers(run: Any) -> list[Any]:
    """Who looks on beside those of every run; the main process's figures are enough."""
    if run.peak_tflops is None or int(os.environ.get("RANK", "0")):
        return []
    import torch

    from ..formats.weights import DTYPES
    from ..plan.plan import sample_operations
    from ..training.observing import Utilisation, measured_rate

    operations = sample_operations(run)
    peak = run.peak_tflops
    if peak == "measured":
        precision = run.optimizer.mixed_precision
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = measured_rate(device, DTYPES["fp32" if precision == "no" else precision]) / 1e12
        logging.getLogger("bdm").warning("measured: %.3g TFLOP/s", peak)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return [Utilisation(operations, run.optimizer.batch_size, peak * 1e12 * processes)]


def _dry_run(run: Any) -> None:
    """Build everything and go through one batch, one step, one save and one grid.

    Says what each took and keeps nothing.
    """
    import tempfile

    from ..training.loop import train
    from ..training.metrics import read_metrics, timed
    from ..training.recipes.build import build_recipe

    logging.getLogger("bdm").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="bdm-dry-run-") as folder:
        out = Path(folder) / run.out.name
        out.mkdir()
        # Encoding the whole corpus first would be no rehearsal.
        recipe = run.recipe.model_copy(update={"cache": False} if hasattr(run.recipe, "cache") else {})
        every: dict[str, Any] = dict.fromkeys(
            ("log_every", "validate_every", "grid_every", "checkpoint_every"), 1
        )
        once = run.optimizer.model_copy(update={"steps": 1, "warmup_steps": 0})
        short = run.model_copy(
            update={"out": out, "recipe": recipe, "optimizer": once, "trackers": (), **every}
        )
        with timed("models and data"):
            built = build_recipe(short)
        built.grid_size = 1
        train(short, built)
        if (out / "metrics.jsonl").is_file():  # the main process has it
            seconds = next(row["seconds"] for row in read_metrics(out) if "seconds" in row)
            print(f"dry run passed; the step of {run.optimizer.batch_size} samples took {seconds:.2f} s")


def _prepare(options: argparse.Namespace) -> None:
    require_packages("bdm prepare")
    import yaml

    from ..config import PrepareConfig, read_config

    config = read_config(options.config, options.overrides, PrepareConfig)
    if int(os.environ.get("RANK", "0")) == 0:
        print(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    if options.check:
        return
    from ..prepare.report import describe_report
    from ..prepare.run import prepare

    quiet()
    if report := prepare(config, options.engine):
        print(describe_report(report, config.out))


def _vocabulary(options: argparse.Namespace) -> None:
    require_packages("bdm vocabulary")
    import yaml

    from ..config import VocabularyConfig, read_config

    config = read_config(options.config, options.overrides, VocabularyConfig)
    print(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    if options.check:
        return
    from ..prepare.vocabulary import make_vocabulary

    quiet()
    print(make_vocabulary(config))
    print(config.out)


def _plan(options: argparse.Namespace) -> None:
    require_packages("bdm plan")
    import json

    from ..config import RunConfig, read_config
    from ..plan.plan import Machine, make_plan
    from ..plan.report import plan_facts, plan_table

    run = read_config(options.config, options.overrides, RunConfig)
    machine = Machine(
        options.gpus, options.gpu_memory, options.gpu_tflops, options.utilisation, options.price_per_hour
    )
    quiet()
    plan = make_plan(run, machine, options.samples)
    print(plan_table(plan))
    print(json.dumps(plan_facts(plan), ensure_ascii=False))
