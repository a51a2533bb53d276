"""Bytes of files on any file system, read exactly and more than once where a store stumbles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from ..errors import UserError

Result = TypeVar("Result")

#: Seconds to wait before each new attempt. A disk either reads or does not; a store may be away for a minute.
DISK_WAITS = (0.05, 0.2, 0.8)
STORE_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0)
#: What no new attempt changes.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class ReadError(OSError):
    """Bytes that could not be read, however often that was tried."""


class NotWhole(UserError):
    """A shard that can never be read: cut off, empty, of another kind or missing."""


def retried(read: Callable[[], Result], url: str) -> Result:
    """The result of ``read``, tried again with growing pauses after an error of the system or the store.

    Args:
        read: may be called several times.
        url: what is read; local files are given up sooner.

    Raises:
        ReadError: it failed every time, or in a way that lasts.
        UserError: as ``read`` raised it.
    """
    waits = DISK_WAITS if is_local(url) else STORE_WAITS
    for wait in (*waits, None):
        try:
            return read()
        except UserError:
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


def read_range(url: str, offset: int, size: int) -> bytes:
    """Exactly these bytes of a file, and no others: in one request where a store is asked.

    Raises:
        ReadError: they cannot be read, or the file ends before.
    """
    return retried(lambda: _read_once(url, offset, size), url) if size else b""


def _read_once(url: str, offset: int, size: int) -> bytes:
    try:
        content = _read_bytes(url, offset, size)
    except Exception:
        _open.cache_clear()  # what stays open may be what is broken
        raise
    if len(content) != size:
        _open.cache_clear()
        raise OSError(f"it ends {size - len(content)} bytes early; was it changed?")
    return content


def _read_bytes(url: str, offset: int, size: int) -> bytes:
    filesystem, path = file_system(url)
    if _answers_ranges(filesystem):
        return filesystem.cat_file(path, start=offset, end=offset + size)
    file = _open(url, os.getpid())
    file.seek(offset)
    return file.read(size)


def _answers_ranges(filesystem: Any) -> bool:
    """Whether a store is asked for a range in one request, without asking about the file first."""
    from fsspec.asyn import AsyncFileSystem

    return isinstance(filesystem, AsyncFileSystem)


@lru_cache(maxsize=64)
def _open(url: str, process: int) -> Any:
    """An open file. Data workers are processes that share their parent's files, so each opens its own."""
    filesystem, path = file_system(url)
    return open_exactly(filesystem, path)


def open_exactly(filesystem: Any, path: str) -> Any:
    """An open file that reads what it is asked for and nothing ahead."""
    try:
        return filesystem.open(path, "rb", cache_type="none")
    except TypeError:  # a file system without such an option
        return filesystem.open(path, "rb")
