"""A folder of pictures with ``metadata.jsonl``: one JSON object a line, ``file_name`` and a caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .buckets import nearest_bucket
from .pictures import PictureRules, picture_size
from .source import Example


class FolderSource:
    """Pictures of a folder.

    Args:
        path: folder with ``metadata.jsonl`` (the layout of Hugging Face's ImageFolder).
        caption: name of the caption's field.
        validation: rows kept for validation, evenly spread; training never sees them.
        held_out: give the validation rows instead of the others.
        rules: see ``PictureRules``; scores are fields of ``metadata.jsonl``.

    Raises:
        UserError: no folder, no metadata, no captions, fewer rows than are kept for validation.
    """

    def __init__(
        self, path: Path, caption: str = "text", validation: int = 64, held_out: bool = False, **rules: Any
    ) -> None:
        self.path, self._caption, self._kept, self._rest = Path(path), caption, validation, rules
        self.rules = PictureRules.of({"captions": {caption: 1.0}}, rules)
        self.size = self.rules.size
        rows = _read_rows(self.path / "metadata.jsonl", caption)
        if len(rows) <= validation:
            raise UserError(
                f"{self.path / 'metadata.jsonl'} has {len(rows)} captions; more than the {validation} kept"
                " for validation are needed"
            )
        every = len(rows) // validation
        kept = set(range(0, every * validation, every))
        self.rows = [row for i, row in enumerate(rows) if (i in kept) == held_out]
        #: (N,) number of each picture's bucket, or None without buckets.
        self.bucket_of: np.ndarray | None = None
        if self.rules.buckets:
            sizes = np.array([picture_size(self.path / row["file_name"]) for row in self.rows])
            self.bucket_of = nearest_bucket(sizes, self.rules.buckets)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """The file of an example."""
        return str(self.path / self.rows[index]["file_name"])

    def caption(self, index: int) -> str:
        """The caption of example ``index``."""
        return self.rules.caption(self.key(index), self.rows[index])

    def captions(self, index: int) -> list[str]:
        """All captions of example ``index``."""
        return [text for text, _ in self.rules.captions_of(self.key(index), self.rows[index])]

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        bucket = int(self.bucket_of[index]) if self.bucket_of is not None else 0
        return self.rules.example(self.key(index), row, self.path / row["file_name"], bucket)

    @property
    def validation(self) -> FolderSource:
        """The rows kept for validation."""
        return FolderSource(self.path, self._caption, self._kept, held_out=True, **self._rest)


def _read_rows(metadata: Path, caption: str) -> list[dict[str, Any]]:
    """The rows of a folder's metadata, each with a file and a caption."""
    if not metadata.is_file():
        raise UserError(
            f'{metadata}: no such file; a data folder needs one line per picture, {{"file_name": ..., "text":'
            " ...}"
        )
    # JSON may hold what Unicode calls ends of lines.
    lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [_read_row(f"{metadata} line {number}", line, caption) for number, line in numbered]


def _read_row(place: str, line: str, caption: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object: {line[:60]!r}")
    if absent := [field for field in ("file_name", caption) if field not in row]:
        raise UserError(f"{place} has no field {absent[0]!r}; it has {', '.join(row)}; set data.caption")
    return row
