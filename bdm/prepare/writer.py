"""A prepared shard on disk: written whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from ..files import atomic_write, write_json, writing_to

#: What a full disk leaves alone.
STAYS = "whole shards stay"


class Unpublished(Exception):
    """A shard is given up."""


class ShardWriter:
    """Writes ``PATH.tar`` and beside it ``PATH.json``; without ``publish`` nothing is left of them.

    Args:
        path: of the tar file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._places: list[list[int]] = []

    def __enter__(self) -> ShardWriter:
        with writing_to(self.path, STAYS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._stack.enter_context(atomic_write(self.path))
            self._file = self._stack.enter_context(open(partial, "wb"))
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        end = Unpublished(f"{self.path} was not published")  # does nothing where it was
        with suppress(OSError):  # closing writes what is still buffered, and the disk may be full
            self._stack.__exit__(Unpublished, end, None)

    def add(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Append a sample."""
        text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode("utf-8")
        with writing_to(self.path, STAYS):
            self._places.append(
                [
                    *self._member(
                        f"{name}.safetensors", save_tensors({k: t.contiguous() for k, t in tensors.items()})
                    ),
                    *self._member(f"{name}.json", text),
                ]
            )

    def publish(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """Move into place, the table first.

        The tar's presence with the size that stands there makes the shard whole.
        """
        with writing_to(self.path, STAYS):
            self._tar.close()
            # A full disk says so before the table is there.
            self._file.flush()
            os.fsync(self._file.fileno())
            whole = {**table, "size": self._file.tell(), "places": self._places}
            write_json(self.path.with_suffix(".json"), whole, indent=None)
            self._stack.close()
        return whole

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        about = tarfile.TarInfo(name)  # its time is 1970 and its owner root, whoever writes when
        about.size = len(content)
        begin = self._file.tell()
        self._tar.addfile(about, io.BytesIO(content))
        return begin + tarfile.BLOCKSIZE, len(content)


def read_table(path: Path) -> dict[str, Any] | None:
    """The table of a whole shard, or None where there is none."""
    try:
        table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return table if path.stat().st_size == table["size"] else None
    except (OSError, ValueError, KeyError):
        return None
