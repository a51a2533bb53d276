"""``index``: a corpus is looked through once, before anybody trains on it."""

from __future__ import annotations

import argparse
from typing import Any

from ..extras import require_packages
from .quiet import quiet


def add_commands(commands: Any) -> None:
    """Add ``index`` to a parser's commands."""
    index = commands.add_parser(
        "index", help="look through a corpus once: which samples are used, where they lie, in which order"
    )
    index.add_argument("config", help="YAML file with data.index, such as that of the run")
    index.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.index=/shared/index")
    index.add_argument(
        "--engine", choices=("accelerate", "ray"), default="accelerate", help="who shares out the shards"
    )
    index.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> None:
    require_packages("bdm index")
    from ..config import IndexConfig, read_config

    config = read_config(options.config, options.overrides, IndexConfig)
    from ..prepare.corpus import index_corpora

    quiet()
    for said in index_corpora(config, options.engine):
        print(said)
