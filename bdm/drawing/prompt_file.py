"""Prompt files: a picture for each row. A row that cannot be read ends none of the others."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, quoted
from .encodings import TextFile, read_text
from .other_names import our_name
from .prompt_lines import read_line
from .row_words import read_row
from .typed_json import has_half_characters

_EXAMPLE = 'give an object such as {"prompt": "红灯笼"}'
#: Texts of a row of BDM-870: file, Chinese, English, long Chinese, long English, type, category.
_BDM870 = 7


@dataclass(frozen=True)
class Row:
    """A row of a prompt file.

    Attributes:
        where: "line 3", "item 3".
        said: what it says of its picture, under the names of a request's fields; with ``file`` and ``count``
            beside them, where it says these.
        wrong: why it cannot be read, else "".
    """

    where: str
    said: Mapping[str, Any]
    wrong: str = ""


@dataclass(frozen=True)
class BDM870:
    """What is taken of the rows of the BDM-870 benchmark.

    Attributes:
        long: the long prompts.
        translations: the English texts too, for the backbone.
    """

    long: bool = False
    translations: bool = False

    def said(self, row: list[Any]) -> dict[str, Any]:
        """What a row says.

        Raises:
            UserError: it is no row of this benchmark.
        """
        if len(row) != _BDM870 or not all(isinstance(text, str) for text in row):
            raise UserError(
                f"is a list of {len(row)}; a row of BDM-870 has {_BDM870} texts (file, Chinese, English, long"
                " Chinese, long English, type, category)"
            )
        first = 3 if self.long else 1
        english = {"prompt_en": row[first + 1]} if self.translations else {}
        return {"prompt": row[first], "file": Path(row[0]).stem, **english}


def read_prompt_file(path: Path, bdm870: BDM870 | None = None) -> list[Row]:
    """The rows of a prompt file, in its order, those that cannot be read among them.

    Args:
        path: JSON (``.json``: a list), JSON lines (``.jsonl``), a table with a header (``.csv``, ``.tsv``),
            or text with a prompt or A1111's options in each line; in UTF-8 with or without a mark, UTF-16
            with one, or GB18030. In lines only line feeds and carriage returns end one, and empty ones count
            for nothing.
        bdm870: what is taken of rows that are lists.

    Raises:
        UserError: a file that cannot be read, or without any row.
    """
    file = read_text(path)
    bdm870 = bdm870 or BDM870()
    readers = {
        ".json": lambda: _json(file, bdm870),
        ".jsonl": lambda: _json_lines(file, bdm870),
        ".ndjson": lambda: _json_lines(file, bdm870),
        ".csv": lambda: _table(file),
        ".tsv": lambda: _table(file),
    }
    rows = list(readers.get(path.suffix.lower(), lambda: _text(file))())
    if not rows:
        raise UserError(f"{path} holds no prompt; give one in each line")
    return rows


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, each with its name."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield f"line {number}", line


def _row(where: str, read: Any, *arguments: Any) -> Row:
    try:
        return Row(where, read(*arguments))
    except UserError as error:
        return Row(where, {}, str(error))


def _text(file: TextFile) -> Iterator[Row]:
    for where, line in _lines(file.text):
        yield _row(where, _read_text, line, file.encoding)


def _read_text(line: str, encoding: str) -> dict[str, Any]:
    _refuse_other_bytes(line, encoding)
    return read_line(line)


def _refuse_other_bytes(text: str, encoding: str) -> None:
    if has_half_characters(text):
        name = {"utf-8": "UTF-8", "gb18030": "GB18030"}.get(encoding, "UTF-16")
        place = next(i for i, character in enumerate(text, 1) if "\ud800" <= character <= "\udfff")
        raise UserError(f"is no {name} (at character {place}); save the file as UTF-8")


def _json_lines(file: TextFile, bdm870: BDM870) -> Iterator[Row]:
    for where, line in _lines(file.text):
        yield _row(where, _read_json_line, line, file.encoding, bdm870)


def _read_json_line(line: str, encoding: str, bdm870: BDM870) -> dict[str, Any]:
    _refuse_other_bytes(line, encoding)
    return _read_item(_loads(line), bdm870)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise UserError(f"is not JSON ({first_line(error)}); {_EXAMPLE}") from None


def _json(file: TextFile, bdm870: BDM870) -> Iterator[Row]:
    try:
        _refuse_other_bytes(file.text, file.encoding)
        content = _loads(file.text)
    except UserError as error:
        raise UserError(f"{file.path} {error}") from None
    items = content if isinstance(content, list) else [content]
    if len(items) == _BDM870 and all(isinstance(item, str) for item in items):
        raise UserError(f"{file.path} is one list of {_BDM870} texts; give a list of such lists")
    for number, item in enumerate(items, 1):
        yield _row(f"item {number}", _read_item, item, bdm870)


def _read_item(item: Any, bdm870: BDM870) -> dict[str, Any]:
    if isinstance(item, list) and item:
        item = bdm870.said(item)
    elif isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise UserError(f"has no prompt; {_EXAMPLE}")
    return read_row(item)


def _table(file: TextFile) -> Iterator[Row]:
    header = file.text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if file.path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    # Only these end a line; csv would take others in Python's texts for ends as well.
    reader = csv.reader(io.StringIO(file.text, newline=""), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(_cells(reader, file.path), [])]
    if names and "prompt" not in map(our_name, names):
        shown = ", ".join(map(quoted, names[:10]))
        raise UserError(
            f"{file.path}: its first line names {shown}, none of which is prompt; give a header such as"
            " prompt,negative,seed"
        )
    first = reader.line_num + 1
    for cells in _cells(reader, file.path):
        if any(cell.strip() for cell in cells):
            yield _row(f"line {first}", _read_cells, names, cells, file.encoding)
        first = reader.line_num + 1


def _cells(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {first_line(error)}; mend the table") from None


def _read_cells(names: list[str], cells: list[str], encoding: str) -> dict[str, Any]:
    if any(cell.strip() for cell in cells[len(names) :]):
        raise UserError(
            f"has {len(cells)} cells and the first line {len(names)}; put texts with commas into quotes"
        )
    for cell in cells:
        _refuse_other_bytes(cell, encoding)
    return read_row(dict(zip(names, cells, strict=False)), texts=True)
