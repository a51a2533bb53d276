"""Where a run's states are: a folder of this machine or of a file system that all share, or a store."""

from __future__ import annotations

import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.reading import TIME_LIMIT, ReadError, copy_file, file_system, is_local, retried, within
from ..errors import UserError
from ..files import atomic_write, remove
from .state_process import torch_save

#: Writes tensors and plain containers into a file.
Save = Callable[[Any, Path], None]
#: The file of a state in several files that is written last: a state without it is none.
INDEX = "index.json"
#: The least speed at which a store is waited for, in bytes a second.
SLOWEST = 2**20


class Place(ABC):
    """Holds states: files such as ``step-00000250.pt``, or folders of files with their index.

    Names of files are relative, with "/" between their parts.
    """

    url: str

    @abstractmethod
    def put(self, name: str, content: Any) -> int:
        """Write tensors and plain containers, whole or not at all; gives the size in bytes."""

    @abstractmethod
    def put_index(self, entry: str, content: Any) -> None:
        """Write the index of a state, whole or not at all."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files of states, with what was set aside."""

    @abstractmethod
    def text(self, name: str) -> bytes:
        """The content of a small file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def fetch(self, name: str, size: int, folder: Path) -> Path:
        """A file of this machine with the same content; made in ``folder`` where it is none yet."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file."""

    @abstractmethod
    def rename(self, name: str, other: str) -> None:
        """Let a file have another name."""

    def entries(self) -> list[str]:
        """The states that are whole, newest first."""
        names = self.names()
        files = [name for name in names if "/" not in name and name.endswith(".pt")]
        folders = [str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == INDEX]
        return sorted([*files, *folders], key=step_of, reverse=True)

    def index(self, entry: str) -> dict[str, Any]:
        """What the index of a state in several files says."""
        return json.loads(self.text(f"{entry}/{INDEX}"))

    def drop(self, entry: str) -> None:
        """Delete a state; one in several files is none any more once the first of them is gone."""
        own = [name for name in self.names() if name == entry or name.startswith(f"{entry}/")]
        for name in sorted(own, key=lambda name: not name.endswith(f"/{INDEX}")):
            self.remove(name)

    def set_aside(self, entry: str) -> None:
        """Let a damaged state take the place of no good one."""
        name = f"{entry}/{INDEX}" if not entry.endswith(".pt") else entry
        self.rename(name, f"{name}.damaged")


def place_of(folder: Path | str, save: Save = torch_save) -> Place:
    """The place at a path or a URL that fsspec knows.

    Args:
        folder: path or URL.
        save: writes a file of tensors.

    Raises:
        UserError: nothing is known of such URLs.
    """
    text = str(folder)
    if is_local(text):
        return LocalPlace(Path(text.removeprefix("file://").removeprefix("local://")), save)
    try:
        file_system(text)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"states {text}: {error}; give a folder, or install the file system's package"
        ) from None
    return StorePlace(text.rstrip("/"), save)


def step_of(name: Path | str) -> int:
    """The step of a state by its name; -1 for none."""
    found = re.fullmatch(r"step-(\d+)(\.pt)?", PurePosixPath(str(name)).name)
    return int(found[1]) if found else -1


class LocalPlace(Place):
    """A folder."""

    def __init__(self, folder: Path, save: Save = torch_save) -> None:
        self.folder, self.url, self._save = folder, str(folder), save

    def put(self, name: str, content: Any) -> int:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            self._save(content, partial)
        return path.stat().st_size

    def put_index(self, entry: str, content: Any) -> None:
        with atomic_write(self.folder / entry / INDEX) as partial:
            partial.write_text(json.dumps(content))

    def names(self) -> list[str]:
        found = [path for path in self.folder.glob("step-*") if path.is_file()]
        found += self.folder.glob("step-*/*")
        return [path.relative_to(self.folder).as_posix() for path in found if path.name[0] != "."]

    def text(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def fetch(self, name: str, size: int, folder: Path) -> Path:
        return self.folder / name

    def remove(self, name: str) -> None:
        remove(self.folder / name)

    def drop(self, entry: str) -> None:
        with suppress(OSError):  # a state in one file has none
            (self.folder / entry / INDEX).unlink()
        remove(self.folder / entry)

    def rename(self, name: str, other: str) -> None:
        os.replace(self.folder / name, self.folder / other)

    def tidy(self) -> None:
        """Remove what a kill left half-written."""
        for partial in [*self.folder.glob(".step-*.partial"), *self.folder.glob("step-*/.*.partial")]:
            with suppress(OSError):
                partial.unlink()


class StorePlace(Place):
    """Files that fsspec writes, such as those of an object store.

    Every file has a name of its own and no file is changed, so that a state is whole once its index is there.
    """

    def __init__(self, url: str, save: Save = torch_save) -> None:
        self.url, self._save = url, save

    def put(self, name: str, content: Any) -> int:
        with tempfile.TemporaryDirectory(prefix="bdm-state-") as folder:
            path = Path(folder) / "state.pt"
            self._save(content, path)
            self._asked("written", lambda: self._upload(path, name), path.stat().st_size)
            return path.stat().st_size

    def _upload(self, path: Path, name: str) -> None:
        system, root = file_system(self.url)
        there = f"{root}/{name}"
        system.put_file(str(path), there)
        system.invalidate_cache()
        size = system.info(there)["size"]
        if size != path.stat().st_size:
            raise OSError(f"{size} of {path.stat().st_size} bytes of {name} arrived")

    def put_index(self, entry: str, content: Any) -> None:
        text = json.dumps(content).encode()

        def write() -> None:
            system, root = file_system(self.url)
            system.pipe_file(f"{root}/{entry}/{INDEX}", text)

        self._asked("written", write, len(text))

    def names(self) -> list[str]:
        def find() -> list[str]:
            system, root = file_system(self.url)
            system.invalidate_cache()
            start = root.rstrip("/")
            return [path.removeprefix(start).lstrip("/") for path in system.find(root)]

        try:
            found = self._asked("listed", find)
        except FileNotFoundError:
            return []
        return [name for name in found if name.startswith("step-")]

    def text(self, name: str) -> bytes:
        return self._asked("read", lambda: self._at(name, "cat_file"))

    def size(self, name: str) -> int:
        return self._asked("read", lambda: self._at(name, "info")["size"])

    def fetch(self, name: str, size: int, folder: Path) -> Path:
        path = folder / PurePosixPath(name).name
        copy_file(f"{self.url}/{name}", size, path)
        return path

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._asked("deleted", lambda: self._at(name, "rm_file"))

    def rename(self, name: str, other: str) -> None:
        system, root = file_system(self.url)
        self._asked("renamed", lambda: system.mv(f"{root}/{name}", f"{root}/{other}"))

    def _at(self, name: str, method: str) -> Any:
        system, root = file_system(self.url)
        return getattr(system, method)(f"{root}/{name}")

    def _asked(self, what: str, work: Callable[[], Any], size: int = 0) -> Any:
        """The store's answer, asked again where it stumbles.

        Raises:
            UserError: it does not answer, or is none that can be reached.
            FileNotFoundError: there is no such file.
        """
        try:
            return retried(lambda: within(TIME_LIMIT + size / SLOWEST, work), self.url)
        except ReadError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                raise cause from None
            raise UserError(
                f"{self.url}: states cannot be {what} ({type(cause).__name__}: {cause})"
            ) from None
