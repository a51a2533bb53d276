"""The one exception for mistakes a user can mend, and texts of others as they may be shown."""

from __future__ import annotations

import unicodedata

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

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


def printable(text: object, most: int | None = None) -> str:
    """A text that somebody else wrote, on one line and with nothing in it that acts on a terminal.

    Blanks of any kind stay blanks; other characters that act (escapes, turns of the reading direction, halves
    of characters) are written as their codes.

    Args:
        text: out of a file, its name or a library.
        most: characters that are kept; None for all.
    """
    whole = str(text)
    kept = whole if most is None or len(whole) <= most else f"{whole[:most]}…"
    if kept.isprintable():
        return kept
    return "".join(map(_shown, kept))


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
