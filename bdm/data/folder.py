"""A folder of pictures with ``metadata.jsonl``: one JSON object a line, ``file_name`` and a caption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .source import Example, crop_to_square


class FolderSource:
    """Pictures resized so that the shorter side fits and cropped to the centre square; never padded.

    Args:
        path: folder with ``metadata.jsonl`` (the layout of Hugging Face's ImageFolder).
        size: side of the pictures in pixels.
        caption: name of the caption's field.
        validation: rows kept for validation, evenly spread; training never sees them.
        held_out: give the validation rows instead of the others.

    Raises:
        UserError: no folder, no metadata, no captions, fewer rows than are kept for validation.
    """

    def __init__(self, path: Path, size: int = 512, caption: str = "text", validation: int = 64, held_out: bool = False) -> None:
        self.path, self.size, self._caption, self._kept = Path(path), size, caption, validation
        metadata = self.path / "metadata.jsonl"
        if not metadata.is_file():
            raise UserError(
                f'{metadata}: no such file; a data folder needs one line per picture, {{"file_name": ..., "text": ...}}'
            )
        rows = []
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{metadata} line {number} is not a JSON object: {line[:60]!r}")
            if absent := [field for field in ("file_name", caption) if field not in row]:
                raise UserError(f"{metadata} line {number} has no field {absent[0]!r}; it has {', '.join(row)}; set data.caption")
            rows.append((row["file_name"], row[caption]))
        if len(rows) <= validation:
            raise UserError(f"{metadata} has {len(rows)} captions; more than the {validation} kept for validation are needed")
        every = len(rows) // validation
        kept = set(range(0, every * validation, every))
        self.rows = [row for i, row in enumerate(rows) if (i in kept) == held_out]

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        """The caption of example ``index``."""
        return self.rows[index][1]

    def __getitem__(self, index: int) -> Example:
        name, caption = self.rows[index]
        try:
            with Image.open(self.path / name) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(
                f"picture {self.path / name} cannot be read ({type(error).__name__}); mend or remove its line"
            ) from None
        picture = crop_to_square(picture, self.size)
        return Example(caption, torch.from_numpy(np.array(picture)).permute(2, 0, 1))

    @property
    def validation(self) -> FolderSource:
        """The rows kept for validation."""
        return FolderSource(self.path, self.size, self._caption, self._kept, held_out=True)
