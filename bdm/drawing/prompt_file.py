"""Prompt files: a picture for each line. A line that cannot be read ends none of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, printable
from ..pipeline.groups import as_seed
from ..text.chunks import refuse_half_characters

#: What a line of a .jsonl file may say of its picture.
_TEXTS = ("prompt", "negative", "prompt_en", "negative_en")
_EXAMPLE = 'give an object such as {"prompt": "红灯笼"}'
#: How files in UTF-8 and UTF-16 may begin.
_UTF8, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Request:
    """One picture to draw, and the file it becomes.

    Attributes:
        line: of the prompt file, counted from 1; 0 where there is none.
    """

    path: Path
    seed: int
    prompt: str
    negative: str = ""
    prompt_en: str = ""
    negative_en: str = ""
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Failure:
    """What gave no picture, and why: "line 3", "is not JSON ..."."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.why}"


def read_requests(
    file: Path,
    folder: Path,
    seed: int,
    count: int = 1,
    texts: Mapping[str, str] | None = None,
    failed: list[Failure] | None = None,
) -> list[Request]:
    """The pictures that a prompt file asks for.

    Args:
        file: UTF-8 text with a native prompt in each line; or, ending in .jsonl, an object in each line with
            ``prompt`` and, where wanted, ``negative``, ``prompt_en``, ``negative_en`` and ``seed``. Line
            feeds and carriage returns end a line, nothing else does. Empty lines count for nothing.
        folder: where the pictures go: ``00000.png`` is the first line's, or ``00000-0.png`` where a line has
            several. A line that cannot be read keeps its number.
        seed: picture i of the file uses seed + i, unless its line says otherwise.
        count: pictures for each line.
        texts: texts of lines that do not say their own.
        failed: gets the lines that cannot be read; without it the first one is an error.

    Raises:
        UserError: an unreadable file, one without any line; a line that cannot be read.
    """
    read = _read_object if file.suffix.lower() == ".jsonl" else _read_prompt
    requests: list[Request] = []
    index = -1
    for index, (number, line) in enumerate(_lines(file)):
        try:
            said: dict[str, Any] = {**(texts or {}), **read(line)}
            seeds = _seeds(said.pop("seed", seed + index * count), count)
        except UserError as error:
            if failed is None:
                raise UserError(f"{file}, line {number} {error}") from None
            failed.append(Failure(f"line {number}", str(error)))
            continue
        names = [f"{index:05d}.png"] if count == 1 else [f"{index:05d}-{i}.png" for i in range(count)]
        requests += [
            Request(folder / name, each, **said, line=number) for name, each in zip(names, seeds, strict=True)
        ]
    if index < 0:
        raise UserError(f"{file} holds no prompt; give one in each line")
    return requests


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}); give a UTF-8 text file with a prompt in each"
            " line"
        ) from None
    if content.startswith(_UTF16):
        raise UserError(f"{file} is in UTF-16; save it as UTF-8")
    for number, line in enumerate(content.removeprefix(_UTF8).splitlines(), 1):
        if line.decode("utf-8", "replace").strip():
            yield number, line


def _seeds(first: int, count: int) -> list[int]:
    try:
        return [as_seed(first + i) for i in range(count)]
    except UserError as error:
        raise UserError(f"asks for {error}") from None


def _read_prompt(line: bytes) -> dict[str, Any]:
    return {"prompt": _decoded(line).strip()}


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"is no UTF-8 ({error.reason} at byte {error.start + 1}); save the file as UTF-8"
        ) from None


def _read_object(line: bytes) -> dict[str, Any]:
    """A line of a .jsonl file, checked."""
    text = _decoded(line)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise UserError(f"is not JSON ({first_line(error)}); {_EXAMPLE}") from None
    if not isinstance(said, dict) or not said.get("prompt"):
        raise UserError(f"has no prompt; {_EXAMPLE}")
    for key, value in said.items():
        _check(key, value)
    return said


def _check(key: str, value: Any) -> None:
    """Refuse what a line may not say.

    Raises:
        UserError: another key, a value of another kind, a text that no file takes.
    """
    if key not in (*_TEXTS, "seed"):
        raise UserError(f"says {printable(key, 60)!r}; allowed are {', '.join(_TEXTS)} and seed")
    if type(value) is not (int if key == "seed" else str):
        wanted = "a whole number" if key == "seed" else "a text"
        raise UserError(f"says that {key} is {printable(repr(value), 60)}; give {wanted}")
    if isinstance(value, str):
        try:
            refuse_half_characters(value)
        except UserError as error:
            raise UserError(f"is no text: {error}") from None
