"""A store for measurements: files of this disk, each request counted and answered late."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem


class SlowStore(AbstractFileSystem):
    """A file system of fsspec, ``slow://PATH``."""

    protocol = "slow"
    cachable = False
    #: Seconds a request.
    latency: ClassVar[float] = 0.0
    #: Requests and bytes so far.
    counts: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return "/" + str(path).removeprefix("slow://").lstrip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and time of a file."""
        about = os.stat(self._strip_protocol(path))
        return {"name": path, "size": about.st_size, "type": "file", "mtime": about.st_mtime}

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """A file that is read at random."""
        return _SlowFile(Path(self._strip_protocol(path)))


class _SlowFile:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def read(self, size: int = -1) -> bytes:
        time.sleep(SlowStore.latency)
        content = self._file.read(size)
        SlowStore.counts.update(requests=1, bytes=len(content))
        return content

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def register(latency: float) -> None:
    """Let fsspec know the store, which answers after so many seconds."""
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    SlowStore.latency = latency
    SlowStore.counts.clear()
