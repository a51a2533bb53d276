"""Which files, model and device a command draws with: ``infer``, ``serve`` and ``web`` alike."""

from __future__ import annotations

import argparse


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--models`` and ``--model``."""
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="FOLDER",
        help=(
            "where files are looked for by name, alias or hash: a folder of them, A1111's, ComfyUI's or an"
            " extra_model_paths.yaml; repeatable (BDM_MODELS names more)"
        ),
    )
    parser.add_argument(
        "--model", default=None, help="pipeline folder or hub name (default: the shipped emoji model)"
    )


def device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the best there is)")
