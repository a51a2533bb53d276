"""The ``bdm`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit status: 0, or 2 after a mistake that one line explains."""
    from .errors import UserError

    parser = argparse.ArgumentParser(prog="bdm", description="Bridge Diffusion Models: train, draw, evaluate.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what a configuration describes")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--dry-run", action="store_true", help="check and print the configuration, then stop")
    options = parser.parse_args(arguments)
    try:
        return {"train": _train}[options.command](options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace) -> int:
    import yaml

    from .config import RunConfig, read_config

    run = read_config(options.config, options.overrides, RunConfig)
    text = yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    print(text)
    if options.dry_run:
        return 0
    from .recipes.build import build_recipe
    from .training import train

    recipe = build_recipe(run)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "config.yaml").write_text(text, encoding="utf-8")
    print(train(run, recipe))
    return 0
