"""The language that a command speaks: English, or one that has a catalogue."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from .catalogue import Catalogue

#: Folders of catalogues lie here, by their languages.
_FOLDER = Path(__file__).parent
#: Languages that a command speaks.
LANGUAGES = ("en", "zh")

_spoken = "en"


def speak(language: str) -> None:
    """From here on messages are in a language, one of ``LANGUAGES``."""
    global _spoken
    _spoken = language


def asked(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The language that a command line asks for, or else the environment.

    Args:
        arguments: behind the program's name.
        environment: whose LC_ALL, LC_MESSAGES and LANG say it, the first of them that says anything.
    """
    words = list(arguments)
    for word, following in zip(words, [*words[1:], ""]):
        option, equals, value = word.partition("=")
        if word == "--":
            break
        if option == "--lang":
            return _known(value if equals else following) or "en"
    named = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return _known(next(filter(None, named), "")) or "en"


def language_option(text: str) -> str:
    """What ``--lang`` may say.

    Raises:
        argparse.ArgumentTypeError: a language without a catalogue.
    """
    known = _known(text)
    if known is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not spoken here; give {' or '.join(LANGUAGES)}")
    return known


def _known(name: str) -> str | None:
    """A language as locales call it: "zh_CN.UTF-8"."""
    plain = name.lower().replace("-", "_").partition("_")[0].partition(".")[0]
    return plain if plain in LANGUAGES else None


def catalogue(language: str) -> Catalogue:
    """The catalogue of a language."""
    return _read(_FOLDER / language)


@cache
def _read(folder: Path) -> Catalogue:
    return Catalogue.read(folder)


def told(text: str) -> str:
    """A message in the language that is spoken; as it is where the language has no words for it."""
    if _spoken == "en":
        return text
    return catalogue(_spoken).told(text) or text


def say(*texts: str) -> None:
    """Print messages, one in a line."""
    for text in texts:
        print(told(text))
