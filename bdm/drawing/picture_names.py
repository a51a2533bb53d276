"""Names of picture files out of patterns: ``[seed]-[prompt]``."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import UserError
from .request import Request

#: Endings of the pictures that are written.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
#: Bytes of a name at most, ending included: file systems allow 255, and a number may follow.
_MOST_BYTES = 200
#: Characters that some file system does not take.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")


def _stem(name: str) -> str:
    return Path(name).stem


#: What stands in brackets, by A1111's names where it has one.
_WORDS: dict[str, Callable[[Request], object]] = {
    "seed": lambda r: r.seed,
    "prompt": lambda r: re.sub(r"\s+", "_", r.prompt.strip()),
    "prompt_spaces": lambda r: r.prompt,
    "prompt_en": lambda r: re.sub(r"\s+", "_", r.prompt_en.strip()),
    "prompt_hash": lambda r: hashlib.sha256(r.prompt.encode()).hexdigest()[:8],
    "negative": lambda r: re.sub(r"\s+", "_", r.negative.strip()),
    "steps": lambda r: r.steps,
    "cfg": lambda r: r.guidance,
    "sampler": lambda r: r.sampler or "default",
    "scheduler": lambda r: r.schedule or "default",
    "width": lambda r: r.width or "default",
    "height": lambda r: r.height or "default",
    "clip_skip": lambda r: r.clip_skip,
    "branch_scale": lambda r: r.branch_scale,
    "model_name": lambda r: _stem(r.model.name) if r.model else "default",
    "model_hash": lambda r: r.model.hash if r.model else "",
    "mode": lambda r: r.mode.name,
}
#: Words that only the place of a picture in its run tells.
_PLACES = ("number", "row", "count")
#: Words of A1111 that would give another name tomorrow.
_TIMES = ("date", "datetime", "job_timestamp", "time")
_BRACKETS = re.compile(r"\[([a-zA-Z_]+)(?:<[^>\]]*>)?\]")


def check_pattern(pattern: str) -> None:
    """See that a pattern's words are known and that it says a file's name.

    Raises:
        UserError: names the word, or the ending that no picture has.
    """
    for word in _BRACKETS.findall(pattern):
        if word.lower() in _TIMES:
            raise UserError(
                f"[{word}] would give every picture another name in the next run, so that all would be drawn"
                " again; use [seed], [number] or [prompt]"
            )
        if word.lower() not in (*_WORDS, *_PLACES):
            known = ", ".join(f"[{name}]" for name in (*_PLACES, *_WORDS))
            raise UserError(f"[{word}] stands for nothing in a file's name; allowed are {known}")
    suffix = Path(_BRACKETS.sub("x", pattern)).suffix.lower()
    if re.fullmatch(r"\.[a-z]{3,5}", suffix) and suffix not in ENDINGS:
        raise UserError(f"{pattern}: allowed endings are .png, .jpg and .webp")


def picture_name(pattern: str, request: Request, number: int, count: int = 0) -> str:
    """The name that a pattern gives a picture; Chinese stays, and the name is short enough for a file.

    Args:
        pattern: such as "[seed]-[prompt].png"; without an ending the picture is a PNG.
        request: the picture's.
        number: of its row, from 0.
        count: of the pictures of its row, from 0.
    """
    places = {"number": f"{number:05d}", "row": number + 1, "count": count}

    def word(found: re.Match[str]) -> str:
        name = found[1].lower()
        value = places[name] if name in places else _WORDS[name](request)
        return safe_name(f"{value:g}" if isinstance(value, float) else str(value))

    ending = next((e for e in ENDINGS if pattern.lower().endswith(e)), "")
    stem = _BRACKETS.sub(word, pattern[: len(pattern) - len(ending)])
    return _fitting(safe_name(stem), pattern[len(pattern) - len(ending) :] or ".png")


def safe_name(text: str) -> str:
    """A text as every file system takes it in a file's name."""
    text = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", text)).strip().strip(".")
    return f"_{text}" if _DEVICES.match(text) else text


def _fitting(stem: str, ending: str) -> str:
    """As much of a stem as a name may hold, cut between characters."""
    room = _MOST_BYTES - len(ending.encode())
    cut = stem.encode()[:room].decode("utf-8", "ignore").rstrip(" .") or "_"
    return cut + ending


def apart(names: Iterable[str]) -> list[str]:
    """The same names, numbered where one is taken already (in upper or lower case)."""
    taken: set[str] = set()
    found = []
    for name in names:
        stem, dot, ending = name.rpartition(".")
        other, number = name, 2
        while other.lower() in taken:
            other, number = f"{stem}-{number}{dot}{ending}", number + 1
        taken.add(other.lower())
        found.append(other)
    return found
