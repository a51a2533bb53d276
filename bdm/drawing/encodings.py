"""Text files of other people's programs: UTF-8 with or without a mark, UTF-16, GB18030."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class TextFile:
    """What a file says.

    Attributes:
        path: the file.
        text: its characters; bytes that are none in its encoding are lone surrogates, as Python has them.
        encoding: "utf-8", "utf-16-le", "utf-16-be" or "gb18030".
    """

    path: Path
    text: str
    encoding: str


def read_text(path: Path) -> TextFile:
    """Read a text file in whichever of these encodings it is.

    Raises:
        UserError: it cannot be read, or is cut in the middle of UTF-16's pairs of bytes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); give a text file with a prompt in each line,"
            " or one of .json, .jsonl, .csv or .tsv"
        ) from None
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return TextFile(path, _decoded(content.removeprefix(mark), encoding, path), encoding)
    encoding = "utf-8" if _is_utf8(content) else "gb18030"
    return TextFile(path, _decoded(content, encoding, path), encoding)


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding, "strict" if encoding.startswith("utf-16") else "surrogateescape")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} begins as UTF-16 and is none ({error.reason} at byte {error.start + 2}); save it as"
            " UTF-8"
        ) from None


def _is_utf8(content: bytes) -> bool:
    """Whether bytes are rather UTF-8 than GB18030.

    A file in UTF-8 may have a broken line, and a short line of GB18030 may be UTF-8 by chance, so the lines
    beyond ASCII vote; where GB18030 cannot read the whole there is no choice.
    """
    try:
        content.decode("gb18030")
    except UnicodeDecodeError:
        return True
    lines = [line for line in content.splitlines() if not line.isascii()]
    good = sum(_decodes(line) for line in lines)
    return 2 * good >= len(lines)


def _decodes(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
