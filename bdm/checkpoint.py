"""Training state on disk: written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Publish a training state atomically: write beside, sync, rename."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; only tensors and plain containers are accepted."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"training state {path} cannot be read ({type(error).__name__}); delete it to start over") from None


def publish_folder(partial: Path, final: Path) -> None:
    """Move a finished folder into place, replacing the one that is there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
