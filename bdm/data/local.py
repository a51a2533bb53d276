"""A bounded folder on this machine's disk that its processes share: each file is made once by one of them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .reading import ReadError, Refused

logger = logging.getLogger("bdm")


class LocalFolder:
    """Files that are made when first asked for; the longest unused ones make room for new ones.

    Whatever the disk refuses (full, read-only) costs the file and not the run: ``get`` then gives None, and
    who asked takes the plain way.

    Args:
        path: of the folder; None for one of this user's among the system's temporary files.
        limit: bytes of all files together.
    """

    def __init__(self, path: Path | None = None, limit: int = 8 * 10**9) -> None:
        self.path, self.limit = path or _own_temporary(), limit
        self._complained = False

    def get(self, name: str, make: Callable[[Path], object]) -> Path | None:
        """The file of a name; made by ``make`` if no process of this machine has.

        Args:
            name: of any characters; another one for another content.
            make: writes a file (see ``refusing``); a ``ReadError`` of it, and what is no error of the
                system, is raised here.
        """
        path = self.place(name)
        try:
            if not self._use(path):
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
                with _locked(path.with_suffix(".lock")):
                    if not self._use(path):
                        self._make(path, make)
            return path
        except ReadError:
            raise
        except (OSError, Refused) as error:
            self._complain(error)
            return None

    def place(self, name: str) -> Path:
        """Where the file of a name is, or would be."""
        return self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.kept"

    def _use(self, path: Path) -> bool:
        """Whether the file is there; noted as used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make(self, path: Path, make: Callable[[Path], object]) -> None:
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            make(partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        found = []
        for file in self.path.glob("*.kept"):
            with suppress(OSError):
                found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        used = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if used <= self.limit:
                break
            if file != newest:
                used -= size
                for gone in (file, file.with_suffix(".lock")):
                    with suppress(OSError):
                        gone.unlink()

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            logger.warning("nothing is kept in %s (%s); data are read from where they are", self.path, error)
        self._complained = True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system lets the next one in when a process is killed."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where two may make the same file
        yield
        return
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_temporary() -> Path:
    """A folder that no other user can have put there."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"bdm-{user}"
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        if path.is_symlink() or (hasattr(os, "getuid") and path.stat().st_uid != user):
            return Path(tempfile.mkdtemp(prefix="bdm-"))
    return path
