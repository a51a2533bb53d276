"""The ``bdm`` command. A module for each group of sub-commands holds their options and functions.

Heavy imports happen inside.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from ..errors import UserError, printable
from . import corpus, draw, files, measure, pictures, serve, sheets, train
from .aliases import with_our_names
from .heavy import leave, own_process
from .language import asked, speak, told
from .parser import Parser

#: What a shell reports for a program that a closed pipe ended.
_PIPE_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit status: 0, 2 after a mistake that one line explains, or 3 where
    some rows of a file could not be drawn and others were.

    Where nobody reads what it prints any more, as with ``| head``, it ends quietly with 141.
    """
    speak(asked(sys.argv[1:] if arguments is None else arguments))
    options = parse(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_MessageFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        options.run(options)
        sys.stdout.flush()
    except UserError as error:
        return _ended(error.status, f"error: {' '.join(str(error).split())}")
    except OSError as error:  # a path that the system refuses, wherever it was used
        if _nobody_reads():
            return _PIPE_CLOSED
        named = f"{printable(error.filename, 120)}: " if error.filename else ""
        return _ended(2, f"error: {named}{printable(error.strerror or error)}")
    except KeyboardInterrupt:
        return _ended(130, "interrupted")
    return _ended(0)


def _ended(status: int, message: str = "") -> int:
    """Say how a command ended. Returns the exit status, which is another one if nobody reads what it says."""
    if message:
        with suppress(BrokenPipeError):
            print(told(message), file=sys.stderr)
    return _PIPE_CLOSED if _nobody_reads() and status == 0 else status


def _nobody_reads() -> bool:
    """Whether the reader of what is printed has gone, such as ``head``; then nothing more is written."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        closed = _is_closed(stream)
        try:
            stream.flush()
        except OSError as error:
            closed = closed or isinstance(error, BrokenPipeError)
        gone = gone or closed
        if closed:
            # Else Python itself would try again when it ends, and complain.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


def _is_closed(stream: TextIO) -> bool:
    """Whether a stream goes into a pipe whose other end is closed; a failed write is not always repeated."""
    try:
        look = select.poll()
        look.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0))
    except (AttributeError, OSError, ValueError):  # not on every system, and not of every stream
        return False


class _MessageFormatter(logging.Formatter):
    """Writes what is logged in the language that is spoken.

    Without characters that act, which names and texts of files may hold.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, without a traceback."""
        return printable(f"{told(record.levelname)}: {told(record.message)}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, ``run`` among them: what they are for.

    Raises:
        SystemExit: there is no such command or option; argparse has said which.
    """
    parser = build_parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = parser.parse_known_args(with_our_names(given, parser.commands()))
    # argparse lets no positional follow an option; here key=value may stand anywhere.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = [*getattr(options, "overrides", []), *rest]
    if hasattr(options, "named_prompts"):
        options.prompt = [*options.prompt, *options.named_prompts]
    return options


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="bdm", description="Bridge Diffusion Models: train, draw, evaluate.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (train, corpus, draw, sheets, serve, pictures, measure, files):
        group.add_commands(commands)
    for command in parser.commands().values():
        command.set_defaults(parser=command)
    parser.translate()
    return parser


def console(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``bdm`` command and of scripts, in a process of their own.

    Args:
        arguments: the command line behind the program's name, if it is not that of the process.
    """
    own_process()
    try:
        status = main(arguments)
    finally:  # argparse's help ends the program
        _nobody_reads()
    leave()
    sys.exit(status)
