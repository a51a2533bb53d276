"""A state's files, checked and put together: once a machine, whatever the number of its processes."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import first_line
from ..files import remove
from ..parallel.pieces import join
from ..parallel.together import Together
from .places import LocalPlace, Place

Result = TypeVar("Result")

#: How reasons begin that speak against a file, and not against this moment.
_DAMAGED = "damaged: "


class Damaged(Exception):
    """A file that is not as it was written."""


def damages(reason: str) -> bool:
    """Whether what is wrong with a state stays wrong."""
    return reason.startswith(_DAMAGED)


def read_together(place: Place, entry: str, together: Together) -> tuple[Any, str]:
    """A state and "", or None and what is wrong with it; joint work of all processes."""
    if isinstance(place, LocalPlace) and entry.endswith(".pt"):
        return _tried(lambda: load_file(place.folder / entry, together.several))
    first = together.first_of_machine
    with tempfile.TemporaryDirectory(prefix="bdm-state-") if first else nullcontext("") as own:
        path, reason = _tried(lambda: _one_file(place, entry, Path(own))) if first else (None, "")
        done = together.all((together.machine, str(path or ""), reason))
        # The first process of a machine comes first.
        path, reason = next((path, reason) for machine, path, reason in done if machine == together.machine)
        result = (None, reason) if reason else _tried(lambda: load_file(Path(path), True, checked=True))
        together.wait()
    return result


def load_file(path: Path, shared: bool = False, checked: bool = False) -> dict[str, Any]:
    """The content of a file of tensors.

    Args:
        path: on this machine, or where all machines see it.
        shared: whether processes of a machine share its memory; the file may go, but must not change.
        checked: whether its checksums were looked at.

    Raises:
        Damaged: they do not agree.
    """
    if reason := "" if checked else _damage(path):
        raise Damaged(reason)
    if shared:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError):  # file systems without it
            pass
    return torch.load(path, map_location="cpu", weights_only=True)


def _one_file(place: Place, entry: str, folder: Path) -> Path:
    """A state in several files as one file of this machine, in ``folder``."""
    alone = entry.endswith(".pt")  # a file of a run whose states were in a folder, copied here
    index = {"whole": "", "files": {"": place.size(entry)}} if alone else place.index(entry)
    sizes = index["files"]

    def fetch(name: str) -> Path:
        path = place.fetch(f"{entry}/{name}".rstrip("/"), sizes[name], folder)
        if path.stat().st_size != sizes[name]:
            raise Damaged(f"{name} has another size")
        if reason := _damage(path):
            raise Damaged(reason)
        return path

    if "whole" in index:
        return fetch(index["whole"])
    layout = load_file(fetch(index["layout"]), checked=True)
    parts = {
        name: load_file(fetch(name), shared=True, checked=True) for name in sizes if name != index["layout"]
    }
    whole = folder / "together.pt"
    torch.save(join(layout, parts.__getitem__), whole)
    for name in sizes:
        remove(folder / name)
    return whole


def _tried(work: Callable[[], Result]) -> tuple[Result | None, str]:
    try:
        return work(), ""
    except Damaged as error:
        return None, f"{_DAMAGED}{error}"
    except Exception as error:  # a disk that fails for now: says nothing against the file
        return None, f"{type(error).__name__}: {first_line(error)}"


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
