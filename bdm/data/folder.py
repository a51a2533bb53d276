"""A folder of pictures with ``metadata.jsonl``: one JSON object a line, ``file_name`` and a caption."""

from __future__ import annotations

import codecs
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .buckets import nearest_bucket
from .captions import decode_text
from .pictures import PictureRules, picture_size, score_of
from .source import Example

logger = logging.getLogger("bdm")

#: Share of the rows that may be damaged or without a caption.
BAD_ROWS = 0.05


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
        sizes = None
        if self.rules.measured:
            sizes = np.array([picture_size(self.path / row["file_name"]) for row in self.rows]).reshape(-1, 2)
        if self.rules.buckets and sizes is not None:
            self.bucket_of = nearest_bucket(sizes, self.rules.buckets)
        #: (N,) whether the filters let a picture pass, or None without filters.
        self.kept: np.ndarray | None = None
        if self.rules.filters:
            scores = {
                name: np.array([score_of(row.get(name)) for row in self.rows])
                for name in self.rules.min_scores
            }
            self.kept = self.rules.passing(scores, sizes)
            if not self.kept.any() and not held_out:
                raise UserError(f"{path}: no picture passes min_scores, min_side and max_aspect; lower them")

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
    lines = metadata.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows, bad = [], []
    for number, line in numbered:
        try:
            rows.append(_read_row(f"{metadata} line {number}", line, caption))
        except UserError as error:
            bad.append(error)
    if bad and (not rows or len(bad) > max(1, BAD_ROWS * len(numbered))):
        raise bad[0]
    if bad:
        logger.warning("%d of %d rows are left out, the first: %s", len(bad), len(numbered), bad[0])
    return rows


def _read_row(place: str, line: bytes, caption: str) -> dict[str, Any]:
    try:
        text = decode_text(line)
        row = json.loads(text)
    except (ValueError, RecursionError):
        text, row = repr(line), None
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object: {text[:60]!r}")
    if absent := [field for field in ("file_name", caption) if field not in row]:
        raise UserError(f"{place} has no field {absent[0]!r}; it has {', '.join(row)}; set data.caption")
    return row
