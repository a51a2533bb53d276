"""States of a run on disk: the newest ones, each whole."""

from __future__ import annotations

import json
import logging
import os
import threading
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line
from ..files import atomic_write

logger = logging.getLogger("bdm")


def save_state(
    folder: Path,
    step: int,
    state: dict[str, Any],
    keep_last: int = 2,
    keep_every: int = 0,
    best: int | None = None,
) -> Path:
    """Write a training state whole or not at all, and only then delete old ones.

    Args:
        folder: of the run's states, ``step-00000250.pt`` and so on.
        step: steps done.
        state: tensors and plain containers.
        keep_last: so many of the newest stay.
        keep_every: states whose step is a multiple stay for good; 0 for none.
        best: the state of this step stays too.

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
        if (not keep_every or _step_of(old) % keep_every) and _step_of(old) != best:
            old.unlink(missing_ok=True)
    return path


class StateWriter:
    """Writes states while training goes on, one after the other.

    Each is whole or not there, as ``save_state`` leaves it: a process that is killed meanwhile has the one
    before. What goes wrong is told when the next one is to be written, or at the end.

    Args:
        background: whether training goes on meanwhile.
    """

    def __init__(self, background: bool = True) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, *state: Any) -> None:
        """Write a state that nobody changes any more; takes what ``save_state`` does.

        Raises:
            UserError: this one, or the one before, cannot be written.
        """
        self.wait()
        if not self._background:
            save_state(*state)
            return
        self._thread = threading.Thread(target=self._work, args=state, name="state")
        self._thread.start()

    def _work(self, *state: Any) -> None:
        try:
            save_state(*state)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            UserError: it could not be.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same at the end of a run that ended otherwise: what goes wrong is only told."""
        try:
            self.wait()
        except UserError as error:
            logger.warning("%s", error)


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


def read_state(path: Path) -> dict[str, Any]:
    """A state of another run, which stays as it is.

    Raises:
        UserError: it cannot be read, or its checksums do not agree.
    """
    try:
        reason = _damage(path)
        if not reason:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds
        reason = first_line(error)
    raise UserError(f"the state {path} cannot be read ({reason}); name another one of its folder")


def configuration(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that a state is of, as far as they decide the result."""
    return json.loads(state["run"])


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
