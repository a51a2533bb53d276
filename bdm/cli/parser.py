"""Command lines are read by argparse, whose texts are told in the language that is spoken."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

from .columns import wrapped
from .language import language_option, told

#: How argparse says that an option is none.
_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w-]+)")


class _Formatter(argparse.HelpFormatter):
    """Help in columns of a terminal, in the language that is spoken."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, told("usage: ") if prefix is None else prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in wrapped(text, width))


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line; sub-commands are of its kind too."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(**settings)
        self.add_argument(
            "--lang",
            type=language_option,
            default=argparse.SUPPRESS,
            metavar="LANGUAGE",
            help="of help and messages: en or zh (default: as LC_ALL or LANG says)",
        )

    def error(self, message: str) -> NoReturn:
        """End with a line that says what is wrong with the command line."""
        unknown = _UNKNOWN.search(message)
        near = difflib.get_close_matches(unknown[1], self.options(), n=1) if unknown else []
        remedy = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        self.exit(2, f"{told('error: {}'.format(f'{message}; {remedy}'))}\n")

    def options(self) -> list[str]:
        """The names of all options."""
        return [name for action in self._actions for name in action.option_strings]

    def commands(self) -> dict[str, Parser]:
        """The parsers of the sub-commands, by their names."""
        parents = (one for one in self._actions if isinstance(one, argparse._SubParsersAction))
        return {name: parser for one in parents for name, parser in one.choices.items()}

    def translate(self) -> None:
        """Tell the help of this parser and its sub-commands in the language that is spoken."""
        self.description, self.epilog = _told(self.description), _told(self.epilog)
        for group in self._action_groups:
            group.title, group.description = _told(group.title), _told(group.description)
        for action in self._actions:
            _translate(action)
            if isinstance(action, argparse._SubParsersAction):
                _translate_all(action)


def _translate_all(commands: Any) -> None:
    for choice in commands._choices_actions:  # the lines of the list of commands
        _translate(choice)
    for parser in commands.choices.values():
        parser.translate()


def _translate(action: argparse.Action) -> None:
    if action.help != argparse.SUPPRESS:
        action.help = _told(action.help)


def _told(text: str | None) -> str | None:
    return text and told(text)
