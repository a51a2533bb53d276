"""The ``bdm`` command. A module for each group of sub-commands holds their options and functions.

Heavy imports happen inside.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..errors import UserError, printable
from . import draw, files, measure, train
from .heavy import leave, own_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit status: 0, or 2 after a mistake that one line explains."""
    options = parse(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that the system refuses, wherever it was used
        named = f"{printable(error.filename, 120)}: " if error.filename else ""
        print(f"error: {named}{printable(error.strerror or error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


class _PrintableFormatter(logging.Formatter):
    """Writes what is logged without characters that act, which names and texts of files may hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, without a traceback."""
        return printable(super().formatMessage(record))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, ``run`` among them: what they are for.

    Raises:
        SystemExit: there is no such command or option; argparse has said which.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse lets no positional follow an option; here key=value may stand anywhere.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = [*getattr(options, "overrides", []), *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="bdm", description="Bridge Diffusion Models: train, draw, evaluate."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (train, draw, measure, files):
        group.add_commands(commands)
    return parser


def console(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``bdm`` command and of scripts, in a process of their own.

    Args:
        arguments: the command line behind the program's name, if it is not that of the process.
    """
    own_process()
    status = main(arguments)
    leave()
    sys.exit(status)
