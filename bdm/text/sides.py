"""One text in two languages -> a text for each side, by the script that its parts are written in."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from .reader import read_prompt

_SEPARATORS = ",，、;；。\n"
_OPEN, _CLOSED = "([{<（", ")]}>）"


def split_sides(text: str) -> tuple[str, str]:
    """(native text, English text) of one text.

    Parts between commas that hold a letter of another script than the Latin one are native, the others
    English; what brackets hold stays together, and so do prompts that AND joins. Each part is on one side,
    with the comma behind it, in the order of the text.

    Args:
        text: such as "红灯笼，masterpiece, 蓝色背景".
    """
    parts = [text] if len(read_prompt(text, full_width=True).parts) > 1 else list(_parts(text))
    native = "".join(part for part in parts if is_native(part))
    english = "".join(part for part in parts if not is_native(part))
    return _trimmed(native), _trimmed(english)


def is_native(text: str) -> bool:
    """Whether a text holds a letter of another script than the Latin one."""
    return any(
        character.isalpha() and not unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN"))
        for character in _without_calls(text)
    )


def _without_calls(text: str) -> str:
    """Without the names of adapters, which may be in any script: ``<lora:name:1>`` is the backbone's."""
    return "".join(
        f"{piece.partition('>')[2]}" if i else piece for i, piece in enumerate(text.split("<lora:"))
    )


def _parts(text: str) -> Iterator[str]:
    """The parts between commas outside brackets, each with the commas and blanks behind it."""
    start, depth, escaped, ended = 0, 0, False, False
    for place, character in enumerate(text):
        if ended and not (character.isspace() or character in _SEPARATORS):
            yield text[start:place]
            start, ended = place, False
        if escaped:
            escaped = False
            continue
        escaped = character == "\\"
        depth += (character in _OPEN) - (character in _CLOSED and depth > 0)
        ended = ended or (depth == 0 and character in _SEPARATORS)
    yield text[start:]


def _trimmed(text: str) -> str:
    return text.strip().strip(_SEPARATORS).strip()
