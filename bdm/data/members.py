"""Members of a tar file -> samples: which files belong together, and which sample is there twice."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .captions import read_facts
from .pictures import picture_size, score_of

PICTURES = ("jpg", "jpeg", "png", "webp")
#: Columns of a sample's members by their ending.
COLUMNS = {**dict.fromkeys(PICTURES, 0), "json": 1, "txt": 2}


@dataclass
class Row:
    """A sample of a tar file.

    Attributes:
        members: place and size of its picture, JSON and text; size 0 where there is none.
        begin: of the header of its first member.
        end: behind its last member.
        size: width and height of the picture; 0 where unknown.
        content: of JSON and text, where they were asked for.
        closed: whether a member came twice, as of another sample of the same name; none is added then.
    """

    members: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0], [0, 0]])
    begin: int = 2**62
    end: int = 0
    size: tuple[int, int] = (0, 0)
    content: list[bytes] = field(default_factory=lambda: [b"", b""])
    closed: bool = False

    def add(self, column: int, member: tarfile.TarInfo) -> bool:
        """Note a member; False where there is one of its kind."""
        self.closed = self.closed or bool(self.members[column][0])
        if not self.closed:
            self.members[column] = [member.offset_data, member.size]
            self.begin = min(self.begin, member.offset)
            self.end = max(self.end, member.offset_data + member.size)
        return not self.closed

    def facts(self) -> Mapping[str, Any]:
        """What its JSON and text say."""
        return read_facts(*self.content)[0]


def group_members(archive: tarfile.TarFile, measured: bool, read: bool) -> tuple[dict[str, Row], int, int]:
    """The samples of a tar file by key.

    Of samples with one key the first counts: what comes after the first member that is there twice belongs to
    nobody for certain.

    Args:
        archive: opened.
        measured: whether the sizes of the pictures are wanted.
        read: whether JSON and text are.

    Returns:
        The samples, the end of the last member, and how many keys occurred again.
    """
    rows: dict[str, Row] = {}
    dotted: list[tuple[str, str, tarfile.TarInfo]] = []
    wanted = _Wanted(archive, measured, read)
    end = 0
    for member in archive:
        end = member.offset_data + member.size
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not member.isfile() or not stem:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if ending.lower() in COLUMNS:
            _note(rows, key, ending.lower(), member, wanted)
        elif ending.rpartition(".")[2].lower() in COLUMNS:
            dotted.append((key, name, member))
    _add_dotted(rows, dotted, wanted)
    return {k: r for k, r in rows.items() if r.members[0][1]}, end, sum(r.closed for r in rows.values())


@dataclass(frozen=True)
class _Wanted:
    """What of a tar file's members is wanted."""

    archive: tarfile.TarFile
    measured: bool
    read: bool

    def take(self, row: Row, column: int, member: tarfile.TarInfo) -> None:
        """Give a sample what is wanted of a member."""
        if not (self.read if column else self.measured):
            return
        file = self.archive.extractfile(member)
        if file is not None and column:
            row.content[column - 1] = file.read()
        elif file is not None:
            row.size = picture_size(file)


def _add_dotted(
    rows: dict[str, Row], dotted: list[tuple[str, str, tarfile.TarInfo]], wanted: _Wanted
) -> None:
    """Samples whose names hold dots; what belongs to a sample of a shorter name (``a.mask.png``) is none."""
    shorter = set(rows)
    for key, name, member in dotted:
        if key not in shorter:
            stem, _, ending = name.rpartition(".")
            folder = member.name.rpartition("/")[0]
            _note(rows, f"{folder}/{stem}" if folder else stem, ending.lower(), member, wanted)


def _note(rows: dict[str, Row], key: str, ending: str, member: tarfile.TarInfo, wanted: _Wanted) -> None:
    column, row = COLUMNS[ending], rows.setdefault(key, Row())
    if row.add(column, member):
        wanted.take(row, column, member)


def score_rows(rows: Mapping[str, Row], names: tuple[str, ...]) -> np.ndarray:
    """(N, K) scores of the samples, NaN where there is none."""
    return np.array([list(_scores(row, names)) for row in rows.values()], dtype=np.float64).reshape(
        len(rows), len(names)
    )


def _scores(row: Row, names: tuple[str, ...]) -> Iterator[float]:
    facts = row.facts() if names else {}
    yield from (score_of(facts.get(name)) for name in names)
