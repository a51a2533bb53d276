"""Lines of text files: a prompt, or A1111's options (``--prompt "..." --seed 5``)."""

from __future__ import annotations

import re
import shlex
from typing import Any

from ..errors import UserError, printable
from .other_names import our_name
from .row_words import read_row

#: Options that stand alone in A1111's lines, and what that says.
_FLAGS = {"do_not_save_samples", "do_not_save_grid", "restore_faces", "tiling"}
#: A line of options begins with one.
_OPTION = re.compile(r"\s*--[A-Za-z]")
#: A1111's seed of an unknown picture.
_RANDOM = "-1"


def read_line(line: str) -> dict[str, Any]:
    """What a line says of its picture, under the names of a request's fields.

    Args:
        line: options where it begins with one, else a prompt.

    Raises:
        UserError: an option that is unknown or without a value, open quotes, no prompt.
    """
    if not _OPTION.match(line):
        return read_row({"prompt": line.strip()})
    said = _options(line)
    if said.get("seed") == _RANDOM:  # then it is ours to choose, as where no seed is said
        del said["seed"]
    return read_row(said, texts=True)


def _options(line: str) -> dict[str, str]:
    words = _words(line)
    said: dict[str, str] = {}
    while words:
        option, equals, value = words.pop(0).partition("=")
        name = our_name(option)
        if not _OPTION.match(option):
            raise UserError(
                f"has {printable(option, 60)!r} where an option should be; put texts with blanks into quotes"
            )
        if not equals and name in _FLAGS:
            following = words[:1] in (["true"], ["false"], ["True"], ["False"])
            value = words.pop(0) if following else "true"
            if value.lower() == "false":
                continue
        elif not equals:
            if not words:
                raise UserError(f"has no value behind {printable(option, 60)}")
            value = words.pop(0)
        if name in said:
            raise UserError(f"says {printable(option, 60)} twice")
        said[name] = value
    return said


def _words(line: str) -> list[str]:
    """The words of a line as a shell reads them: quotes hold together, a backslash escapes in double ones."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    try:
        return list(reader)
    except ValueError as error:
        raise UserError(f"cannot be read ({error}); close the quotes") from None
