"""A folder of text files whose lines stand for ``__name__`` in prompts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import UserError, printable


@dataclass(frozen=True)
class Wildcards:
    """Wildcards by name: the path of a file below the folder, with / and without its .txt.

    Attributes:
        files: each with its place.
    """

    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path) -> Wildcards:
        """The text files of a folder and the folders in it.

        Raises:
            UserError: there is no such folder.
        """
        place = Path(folder)
        if not place.is_dir():
            raise UserError(f"{printable(folder, 300)}: no such folder; give one with wildcards' .txt files")
        paths = sorted(path for path in place.rglob("*.txt") if path.is_file())
        return cls({path.relative_to(place).with_suffix("").as_posix(): path for path in paths})

    def lines(self, name: str) -> Sequence[str]:
        """The lines of a wildcard, each once, in order; () where there is none of that name.

        Empty lines and those that begin with # are left out.

        Args:
            name: of a file, or a pattern such as ``animals/*``.

        Raises:
            UserError: a file cannot be read.
        """
        if name not in self._kept:
            named = [name] if name in self.files else fnmatch.filter(self.files, name)
            read = {line: None for each in named for line in _lines_of(self.files[each])}
            self._kept[name] = sorted(read)
        return self._kept[name]

    @cached_property
    def _kept(self) -> dict[str, list[str]]:
        return {}


#: No wildcards at all: ``__name__`` stays what it is.
NO_WILDCARDS = Wildcards()


def _lines_of(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(path, 300)} cannot be read ({error.strerror}); check the file") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = _decoded_otherwise(content, path)
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _decoded_otherwise(content: bytes, path: Path) -> str:
    """UTF-16 with its mark, or GB18030, in which Windows wrote Chinese."""
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if marked else "gb18030")
    except UnicodeDecodeError:
        raise UserError(f"{printable(path, 300)} is no text in UTF-8; save it as UTF-8") from None
