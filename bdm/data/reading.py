"""Bytes of files on any file system, read exactly and more than once where a store stumbles."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

Result = TypeVar("Result")

#: Seconds to wait before each new attempt. A disk either reads or does not; a store may be away for a minute.
DISK_WAITS = (0.05, 0.2, 0.8)
STORE_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0)
#: Seconds until a store's answer is given up.
TIME_LIMIT = 120.0
#: Bytes that are copied at once.
PIECE = 32 * 2**20
#: What no new attempt changes.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ReadError(OSError):
    """Bytes that could not be read, however often that was tried."""


class NotWhole(UserError):
    """A shard that can never be read: cut off, empty, of another kind or missing."""


def retried(read: Callable[[], Result], url: str, waits: Sequence[float] | None = None) -> Result:
    """The result of ``read``, tried again with growing pauses after an error of the system or the store.

    Args:
        read: may be called several times.
        url: what is read; local files are given up sooner.
        waits: seconds before each new attempt, if not the usual ones.

    Raises:
        ReadError: it failed every time, or in a way that lasts.
        UserError: as ``read`` raised it.
    """
    if waits is None:
        waits = DISK_WAITS if is_local(url) else STORE_WAITS
    for wait in (*waits, None):
        try:
            return read()
        except (UserError, Refused):
            raise
        except Exception as error:  # stores have exceptions of their own libraries
            if wait is None or isinstance(error, LASTING):
                raise ReadError(f"{url} cannot be read ({type(error).__name__}: {error})") from error
            time.sleep(wait)
    raise AssertionError(url)


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def locate(url: str) -> tuple[Any, str, dict[str, Any]]:
    """The fsspec file system of a file, its path there and what is known of it.

    Raises:
        UserError: it cannot be opened; ``NotWhole`` where it is not there.
    """
    try:
        filesystem, path = file_system(url)
        return filesystem, path, retried(lambda: filesystem.info(path), url)
    except (OSError, ValueError, ImportError) as error:
        kind = NotWhole if isinstance(error.__cause__, FileNotFoundError) else UserError
        raise kind(
            f"shard {url} cannot be opened ({error}); check the path and the file system's package"
        ) from None


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path there."""
    import fsspec

    return fsspec.url_to_fs(url)


def stamp(url: str, about: Mapping[str, Any]) -> list[Any]:
    """What changes when a file does."""
    return [url, about.get("size"), str(about.get("mtime") or about.get("ETag") or about.get("LastModified"))]


def read_range(url: str, offset: int, size: int, tries: bool = True) -> bytes:
    """Exactly these bytes of a file, and no others: in one request where a store is asked.

    Args:
        url: of the file.
        offset: of the first.
        size: how many.
        tries: whether to try again where it fails.

    Raises:
        ReadError: they cannot be read, or the file ends before.
    """
    if not size:
        return b""
    waits = None if tries else ()
    return retried(lambda: _read_once(url, offset, size), url, waits)


def _read_once(url: str, offset: int, size: int) -> bytes:
    place = os.getpid(), threading.get_ident()
    try:
        if is_local(url):
            content = _read_bytes(url, offset, size, *place)
        else:
            content = within(TIME_LIMIT, lambda: _read_bytes(url, offset, size, *place))
    except Exception:
        _open.cache_clear()  # what stays open may be what is broken
        raise
    if len(content) != size:
        _open.cache_clear()
        raise OSError(f"it ends {size - len(content)} bytes early; was it changed?")
    return content


def within(seconds: float, read: Callable[[], Result]) -> Result:
    """The result of ``read``.

    Raises:
        TimeoutError: it takes longer; what it waits for is left to itself.
    """
    done: list[tuple[Result | None, Exception | None]] = []

    def work() -> None:
        try:
            done.append((read(), None))
        except Exception as error:
            done.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    result, error = done[0]
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _read_bytes(url: str, offset: int, size: int, process: int, thread: int) -> bytes:
    filesystem, path = file_system(url)
    if _answers_ranges(filesystem):
        return filesystem.cat_file(path, start=offset, end=offset + size)
    file = _open(url, process, thread)
    file.seek(offset)
    return file.read(size)


def _answers_ranges(filesystem: Any) -> bool:
    """Whether a store is asked for a range in one request, without asking about the file first."""
    from fsspec.asyn import AsyncFileSystem

    return isinstance(filesystem, AsyncFileSystem)


@lru_cache(maxsize=64)
def _open(url: str, process: int, thread: int) -> Any:
    """An open file. Data workers are processes that share their parent's files, so each opens its own."""
    filesystem, path = file_system(url)
    return open_exactly(filesystem, path)


def open_exactly(filesystem: Any, path: str) -> Any:
    """An open file that reads what it is asked for and nothing ahead."""
    try:
        return filesystem.open(path, "rb", cache_type="none")
    except TypeError:  # a file system without such an option
        return filesystem.open(path, "rb")


def copy_file(url: str, size: int, path: Path) -> int:
    """Copy a file of a store to this disk, piece by piece; gives the CRC-32 of what was copied.

    Raises:
        ReadError: a piece cannot be read.
        Refused: this disk does not take it.
    """
    crc = 0
    with ExitStack() as stack:
        with refusing():
            file = stack.enter_context(open(path, "wb"))
        for offset in range(0, size, PIECE):
            content = read_range(url, offset, min(PIECE, size - offset))
            crc = zlib.crc32(content, crc)
            with refusing():
                file.write(content)
        with refusing():
            file.flush()
    return crc


def crc_of(path: Path) -> int:
    """The CRC-32 of a file of this disk."""
    crc = 0
    with open(path, "rb") as file:
        while content := file.read(PIECE):
            crc = zlib.crc32(content, crc)
    return crc


class Refused(Exception):
    """This disk does not take a file."""


@contextmanager
def refusing() -> Iterator[None]:
    """Tell refusals of this disk from those of the store that is read."""
    try:
        yield
    except OSError as error:
        raise Refused(error.strerror or error) from None
