"""Training state on disk: written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

logger = logging.getLogger("bdm")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text through a temporary file, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def append_line(path: Path, content: Any) -> None:
    """Append a line of JSON; a torn line before it, from a full disk, is ended first.

    Raises:
        UserError: it cannot be written.
    """
    with writing_to(path), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(content, ensure_ascii=False).encode("utf-8") + b"\n")


@contextmanager
def writing_to(path: Path, what_stays: str = "saved states are intact") -> Iterator[None]:
    """Turn what the system says of a full disk or read-only folder into one line, which says what is safe."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); {what_stays}: make room or choose another"
            " out=, and start again with the same command"
        ) from None


def check_writable(folder: Path) -> None:
    """See that a folder can be written, or made, without making it.

    Raises:
        UserError: names what is in the way.
    """
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is a file"
        raise UserError(f"folder {folder}: {existing} {what}; choose another with out=FOLDER")


def save_state(
    folder: Path, step: int, state: dict[str, Any], keep_last: int = 2, keep_every: int = 0
) -> Path:
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
    """The newest state that is whole, or None where there is none.

    Only tensors and plain containers are read.

    A state that was damaged after it was written (its checksums do not agree) is set aside as ``.damaged``
    with a warning, so that it takes the place of no good one. What a kill left half-written is removed.

    Raises:
        UserError: there are states and none can be read.
    """
    for partial in folder.glob(".step-*.partial"):
        with suppress(OSError):
            partial.unlink()
    for path in state_files(folder):
        try:
            reason = _damage(path)
            if not reason:
                return torch.load(path, map_location="cpu", weights_only=True)
            with suppress(OSError):  # another process was first, or the folder is read-only
                os.replace(path, path.with_name(f"{path.name}.damaged"))
        except (
            Exception
        ) as error:  # too little memory, a disk that fails for now: says nothing against the file
            reason = type(error).__name__
        logger.warning("state %s cannot be read (%s); trying the one before it", path, reason)
    # Those that an earlier start set aside count, too: a run does not begin anew because it was started
    # twice.
    if unread := len(list(folder.glob("step-*.pt*"))):
        raise UserError(
            f"none of the {unread} states in {folder} can be read; delete the folder to start over"
        )
    return None


def _damage(path: Path) -> str:
    """What is wrong with a state's archive by its own checksums, or "" if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many kinds
        return type(error).__name__
    return f"{part} is damaged" if part else ""


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
    if (
        replaces is None
        or not index.is_file()
        or f'"{replaces}"' not in index.read_text(encoding="utf-8", errors="replace")
    ):
        allowed = f" or one that holds a {replaces}" if replaces else ""
        raise UserError(
            f"{folder} is a folder with files in it, which stay as they are; give a new or empty"
            f" folder{allowed}"
        )


def publish_folder(partial: Path, final: Path) -> None:
    """Move a finished folder into place, replacing the one that is there (see ``refuse_occupied``)."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
