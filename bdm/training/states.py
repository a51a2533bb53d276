"""States of a run on disk: the newest ones, each whole."""

from __future__ import annotations

import logging
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import atomic_write

logger = logging.getLogger("bdm")


def save_state(
    folder: Path, step: int, state: dict[str, Any], keep_last: int = 2, keep_every: int = 0
) -> Path:
    """Write a training state whole or not at all, and only then delete old ones.

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial, open(partial, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
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
