"""Options under the names of other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..drawing.other_names import our_option
from .parser import Parser


def with_our_names(arguments: Sequence[str], commands: Mapping[str, Parser]) -> list[str]:
    """A command line whose options have our names where they had those of other programs.

    Args:
        arguments: behind the program's name.
        commands: the parsers of the sub-commands.
    """
    command = next((commands[word] for word in arguments if word in commands), None)
    known = set(command.options()) if command is not None else set()
    found: list[str] = []
    for i, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[i:]]
        option, equals, value = word.partition("=")
        ours = our_option(option) if option.startswith("--") and option not in known else option
        found.append(ours + equals + value if ours in known else word)
    return found
