"""Files and folders that are written whole or not at all, and what to say where they cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

#: Bytes that file systems allow a name.
LONGEST_NAME = 255


def cache_folder() -> Path:
    """Where things are kept that can be worked out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdm"


@contextmanager
def atomic_write(path: Path, shared: bool = False) -> Iterator[Path]:
    """Gives a place beside ``path``; the file or folder that the ``with`` block makes there becomes ``path``.

    When the block ends, what it made is synced and renamed, so that a reader, and whoever comes after a power
    failure, finds the old or the new, never half of it. After an exception of any kind nothing of it is left,
    and what was at ``path`` stays.

    Args:
        path: its folder must be there. A folder at ``path`` is replaced (see ``refuse_occupied``).
        shared: several processes may write it at the same time; each does so under a name of its own.
    """
    partial = _hidden(path, f"{os.getpid()}.partial" if shared else "partial")
    remove(partial)  # what a kill left
    try:
        yield partial
        _sync(partial)
        _move(partial, path)
        _sync_one(path.parent)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise


def _hidden(path: Path, ending: str) -> Path:
    """A name beside ``path`` that listings leave out; in place of one that would be too long, a hash."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{ending}"
    return path.with_name(name)


def _sync(made: Path) -> None:
    """Have all of a file or folder on the disk."""
    if made.is_dir():
        for inside in made.iterdir():
            _sync(inside)
    _sync_one(made)


def _sync_one(path: Path) -> None:
    posix = os.name == "posix"
    if path.is_dir() and not posix:  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(made: Path, path: Path) -> None:
    """Rename; what is in a folder's way steps aside, and comes back if that fails."""
    if not (made.is_dir() and path.exists()):
        os.replace(made, path)
        return
    aside = _hidden(path, "old")
    remove(aside)
    os.replace(path, aside)
    try:
        os.replace(made, path)
    except BaseException:
        os.replace(aside, path)
        raise
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_bytes(to_json(content, indent) + b"\n")


def to_json(content: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8, with halves of surrogate pairs, which UTF-8 has not, as JSON's escapes."""
    return json.dumps(content, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, content: Any) -> None:
    """Append a line of JSON; a torn line before it, from a full disk, is ended first.

    Raises:
        UserError: it cannot be written.
    """
    with writing_to(path), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(to_json(content) + b"\n")


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
