"""States of a run on disk or in a store: the newest ones, each whole."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..errors import UserError
from ..parallel.pieces import save_pieces
from ..parallel.together import Together
from .copying import Copies
from .places import INDEX, LocalPlace, Place, Save, place_of, step_of
from .pruning import prune
from .state_process import SharedBuffers, StateProcess, torch_save
from .state_reading import damages, read_together

logger = logging.getLogger("bdm")


def save_state(
    folder: Path | str,
    step: int,
    state: dict[str, Any],
    keep_last: int = 2,
    keep_every: int = 0,
    best: int | None = None,
    save: Save = torch_save,
) -> None:
    """Write a training state whole or not at all, and only then delete old ones.

    Args:
        folder: of the run's states, or its URL. In a folder of this machine a state is a file,
            ``step-00000250.pt`` and so on, elsewhere a folder whose index is written last.
        step: steps done.
        state: tensors and plain containers.
        keep_last: so many of the newest stay.
        keep_every: states whose step is a multiple stay for good; 0 for none.
        best: the state of this step stays too.
        save: writes a file.

    Raises:
        UserError: it cannot be written (disk full, folder read-only); the states from before are untouched.
    """
    place, entry = place_of(folder, save), f"step-{step:08d}"
    with _told(place, step):
        if isinstance(place, LocalPlace):
            entry = f"{entry}.pt"
            place.put(entry, state)
        else:
            name = f"whole-{secrets.token_hex(4)}.pt"
            size = place.put(f"{entry}/{name}", state)
            place.put_index(entry, {"whole": name, "files": {name: size}})
    prune(place, entry, keep_last, keep_every, best)


def save_state_in_pieces(
    folder: Path | str,
    step: int,
    state: dict[str, Any],
    group: Any,
    keep_last: int = 2,
    keep_every: int = 0,
    best: int | None = None,
    save: Save = torch_save,
) -> None:
    """The same of a state whose pieces are in several processes; joint work of all of them.

    Args:
        folder: one that all processes see.
        step: see ``save_state``.
        state: what ``bdm.parallel.pieces.Pieces`` collected.
        group: of processes, that nothing else uses meanwhile.
        keep_last: see ``save_state``.
        keep_every: see ``save_state``.
        best: see ``save_state``.
        save: see ``save_state``.
    """
    place, entry = place_of(folder, save), f"step-{step:08d}"

    def publish(layout: Any, sizes: dict[str, int]) -> None:
        name = f"layout-{secrets.token_hex(4)}.pt"
        with _told(place, step):
            sizes = sizes | {name: place.put(f"{entry}/{name}", layout)}
            place.put_index(entry, {"layout": name, "files": sizes})
        prune(place, entry, keep_last, keep_every, best)

    def put(name: str, content: Any) -> int:
        with _told(place, step):
            return place.put(f"{entry}/{name}", content)

    save_pieces(state, put, publish, group)


@contextmanager
def _told(place: Place, step: int) -> Iterator[None]:
    """Say what it means that a state cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:  # torch reports a full disk as a RuntimeError
        cure = "mend that" if isinstance(error, UserError) else "make room"
        raise UserError(
            f"the state of step {step} cannot be written to {place.url} ({str(error).splitlines()[0][:160]});"
            f" the one before it is intact: {cure} and start again with the same command"
        ) from None


class StateWriter:
    """Writes states while training goes on, one after the other.

    Each is whole or not there, as ``save_state`` leaves it: a process that is killed meanwhile has the one
    before. What goes wrong is told when the next one is to be written, or at the end.

    Also copies of tensors that only a step changes are made while training goes on. Before it changes them it
    calls ``copied``.

    Args:
        background: whether training goes on meanwhile.
    """

    def __init__(self, background: bool = True) -> None:
        self._background = background
        shared = background and hasattr(os, "memfd_create")
        self._buffers = SharedBuffers() if shared else None
        self._process = StateProcess(self._buffers) if self._buffers else None
        self._copies = self._written = Copies(_room)  # of the next state; of the one that is written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    def next(self, steady: Iterable[Tensor] = ()) -> Callable[[Tensor], Tensor]:
        """What makes copies of the next state's tensors, on the CPU, when the one before is written.

        Args:
            steady: tensors that nobody changes before ``copied`` was called; their copies may get their
                values after ``write``.

        Raises:
            UserError: that one cannot be written.
        """
        self.wait()
        if self._buffers is not None:
            self._buffers.reset()
        room = self._buffers.room if self._buffers is not None else _room
        self._copies = Copies(room, steady if self._background else ())
        return self._copies

    def copied(self) -> None:
        """Return when the tensors of the state that is being written may change."""
        if self._thread is not None:
            self._written.wait()

    def write(self, *state: Any, how: Callable[..., None] = save_state) -> None:
        """Write a state of copies that nobody changes any more.

        Args:
            state: what ``how`` takes.
            how: ``save_state`` or ``save_state_in_pieces``.

        Raises:
            UserError: this one, or the one before, cannot be written.
        """
        self.wait()
        if not self._background:
            how(*state)
            return
        self._written, self._copies = self._copies, Copies(_room)
        thread = threading.Thread(target=self._work, args=(self._written, how, state), name="state")
        thread.start()
        self._thread = thread

    def _work(self, copies: Copies, how: Callable[..., None], state: tuple[Any, ...]) -> None:
        write = self._process.save if self._process else torch_save

        def save(content: Any, path: Path) -> None:
            copies.check()  # here, where all processes hear of it
            write(content, path)

        copies.make()
        try:
            how(*state, save=save)
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
        if self._process is not None and self._buffers is not None:
            self._process.close()
            self._buffers.close()
            self._buffers = self._process = None


def _room(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


def state_files(folder: Path) -> list[Path]:
    """The states of a run in a folder of this machine, newest first; folders are states in several files."""
    return [folder / entry for entry in place_of(folder).entries()]


def load_state(folder: Path | str, together: Together | None = None) -> dict[str, Any] | None:
    """The newest state that is whole, or None where there is none; the same one in all processes.

    Only tensors and plain containers are read.

    A state that was damaged after it was written (its checksums do not agree) is set aside as ``.damaged``
    with a warning, so that it takes the place of no good one. What a kill left half-written is removed.

    Args:
        folder: as for ``save_state``.
        together: the processes, all of which must call it; those of a machine read each byte once.

    Raises:
        UserError: there are states and none can be read.
    """
    together, place = together or Together(), place_of(folder)
    for entry in together.by_first(lambda: _begun(place)):
        state, reason = read_together(place, entry, together)
        reasons = [each for each in together.all(reason) if each]
        if not reasons:
            return state
        if together.first and damages(reason):
            with suppress(OSError, UserError):  # the folder is read-only
                place.set_aside(entry)
        logger.warning(
            "state %s/%s cannot be read (%s); trying the one before it", place.url, entry, reasons[0]
        )
    # Those that an earlier start set aside count, too: a run does not begin anew because it was started
    # twice.
    if unread := together.by_first(lambda: len(_whole_or_damaged(place))):
        raise UserError(
            f"none of the {unread} states in {folder} can be read; delete the folder to start over"
        )
    return None


def _begun(place: Place) -> list[str]:
    if isinstance(place, LocalPlace):
        place.tidy()
    return place.entries()


def _whole_or_damaged(place: Place) -> set[str]:
    """States by name."""
    names = {name.removesuffix(".damaged") for name in place.names()}
    return {name for name in names if "/" not in name or name.endswith(f"/{INDEX}")}


def find_state(run: Path | str) -> str | None:
    """Where a run's newest state is; None without one.

    Args:
        run: its folder, the folder or URL of its states, or one of them.
    """
    text = str(run).rstrip("/")
    if step_of(text) >= 0 or Path(text).is_file():
        return text
    config = Path(text) / "config.yaml"
    said = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    for folder in filter(None, (said.get("states"), f"{text}/states", text)):
        place = place_of(folder)
        for entry in place.entries():
            return f"{place.url}/{entry}"
    return None


def read_state(path: Path | str, together: Together | None = None) -> dict[str, Any]:
    """A state of another run, which stays as it is; joint work where there are several processes.

    Args:
        path: a file, a folder with an index, or its URL.
        together: the processes.

    Raises:
        UserError: it cannot be read, or its checksums do not agree.
    """
    together, (folder, _, entry) = together or Together(), str(path).rstrip("/").rpartition("/")
    state, reason = read_together(place_of(folder or "."), entry, together)
    if reason := next((each for each in together.all(reason) if each), ""):
        raise UserError(f"the state {path} cannot be read ({reason}); name another one of its folder")
    assert state is not None
    return state


def configuration(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that a state is of, as far as they decide the result."""
    return json.loads(state["run"])
