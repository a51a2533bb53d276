"""Training state on disk: written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

logger = logging.getLogger("bdm")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_state(folder: Path, step: int, state: dict[str, Any], keep_last: int = 2, keep_every: int = 0) -> Path:
    """Publish a training state atomically: write beside, sync, rename, and only then delete old ones.

    Args:
        folder: of the run's states, ``step-00000250.pt`` and so on.
        step: steps done.
        state: tensors and plain containers.
        keep_last: so many of the newest stay.
        keep_every: states whose step is a multiple stay for good; 0 for none.

    Returns:
        The new file.

    Raises:
        UserError: it cannot be written (disk full, folder read-only); the states from before are untouched.
    """
    path = folder / f"step-{step:08d}.pt"
    partial = folder / f".{path.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        partial.unlink(missing_ok=True)
        raise UserError(
            f"the state of step {step} cannot be written to {folder} ({str(error).splitlines()[0][:120]}); "
            "the one before it is intact: make room and start again with the same command"
        ) from None
    for old in state_files(folder)[keep_last:]:
        if not keep_every or _step_of(old) % keep_every:
            old.unlink(missing_ok=True)
    return path


def state_files(folder: Path) -> list[Path]:
    """The states of a run, newest first."""
    return sorted(folder.glob("step-*.pt"), key=_step_of, reverse=True)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest state that is whole, or None where there is none; only tensors and plain containers are read.

    A state that was damaged after it was written (its checksums do not agree) is set aside with a warning.

    Raises:
        UserError: there are states and all are damaged.
    """
    files = state_files(folder)
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is None:
                return torch.load(path, map_location="cpu", weights_only=True)
            reason = f"{damaged} is damaged"
        except Exception as error:  # zipfile, pickle and torch raise many kinds for a damaged file
            reason = type(error).__name__
        logger.warning("state %s cannot be read (%s); trying the one before it", path, reason)
    if files:
        raise UserError(f"none of the {len(files)} states in {folder} can be read; delete the folder to start over")
    return None


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_occupied(folder: Path, replaces: str | None = None) -> None:
    """Refuse a folder for output that holds files of someone else's.

    Args:
        folder: where a new folder is to be published.
        replaces: pipeline class whose folders may be replaced; None for none.

    Raises:
        UserError: it is a file, or a folder that holds anything else.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the name of a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    index = folder / "model_index.json"
    if replaces is None or not index.is_file() or f'"{replaces}"' not in index.read_text(encoding="utf-8", errors="replace"):
        allowed = f" or one that holds a {replaces}" if replaces else ""
        raise UserError(f"{folder} is a folder with files in it, which stay as they are; give a new or empty folder{allowed}")


def publish_folder(partial: Path, final: Path) -> None:
    """Move a finished folder into place, replacing the one that is there (see ``refuse_occupied``)."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
