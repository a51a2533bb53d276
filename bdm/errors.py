"""The one exception for mistakes a user can mend, and texts of others as they may be shown."""

from __future__ import annotations

import operator
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Characters of a message at most; what a file's author wrote into it must not fill the screen.
LONGEST_MESSAGE = 10_000

#: Joiners: controls by name, without which emoji and some scripts fall apart.
_JOINERS = "\u200c\u200d"
#: Kinds of characters that are not shown but act: controls, formats such as those that turn the reading
#: direction, halves of characters, ends of lines and paragraphs.
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")


class UserError(ValueError):
    """A mistake in what the user gave: what was seen, what is allowed, what to do.

    Command-line entry points print the message in one line and exit with status 2; library callers get an
    ordinary ``ValueError``. Messages quote names and texts of files, so they are made ``printable``.
    """

    #: With which command-line entry points end.
    status = 2

    def __init__(self, message: object) -> None:
        super().__init__(printable(message, LONGEST_MESSAGE))


def printable(text: object, most: int | None = None) -> str:
    """A text that somebody else wrote, on one line and with nothing in it that acts on a terminal.

    Blanks of any kind stay blanks; other characters that act (escapes, turns of the reading direction, halves
    of characters) are written as their codes.

    Args:
        text: out of a file, its name or a library.
        most: characters that are kept; None for all.
    """
    try:
        whole = str(text)
    except ValueError:  # a number of more digits than Python writes
        whole = f"a {type(text).__name__} that cannot be shown"
    kept = whole if most is None or len(whole) <= most else f"{whole[:most]}…"
    if kept.isprintable():
        return kept
    return "".join(map(_shown, kept))


def quoted(value: object, most: int = 60) -> str:
    """A value that somebody gave, as code and cut, for messages.

    Args:
        value: of any kind; numbers may have more digits than Python writes.
        most: characters that are kept.
    """
    try:
        return printable(repr(value), most)
    except Exception:  # a repr of somebody else's, or a number of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown"


@contextmanager
def refused_paths(source: object) -> Iterator[None]:
    """Whatever the system refuses of a path inside the ``with`` block is one line: no name of that length, no
    permission.

    Args:
        source: the path, or another name.

    Raises:
        UserError: the path cannot be used.
    """
    if "\0" in str(source):
        raise UserError(f"{quoted(str(source), 120)}: no path holds a character of code 0; check the path")
    try:
        yield
    except OSError as error:
        named = printable(error.filename or source, 300)
        said = error.strerror or first_line(error)
        raise UserError(f"{named}: {said}; check the path and its permissions") from None


def whole_number(value: Any) -> int | None:
    """A whole number of any library's as Python's; None for whatever else, truth values among it."""
    # A tensor of truth values counts as numbers too.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor without values
        return None


def _shown(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _ACTING:
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")


def first_line(error: Exception, most: int = 120) -> str:
    """The beginning of what an exception of a library says, for messages of one line.

    Its kind where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:most]) if lines else type(error).__name__
