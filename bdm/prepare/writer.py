"""A prepared shard on disk: written whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from ..files import write_json, writing_to

#: What a full disk leaves alone.
STAYS = "whole shards stay"


class ShardWriter:
    """Writes ``PATH.tar`` and beside it ``PATH.json``; without ``publish`` nothing is left of them.

    Args:
        path: of the tar file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._places: list[list[int]] = []

    def __enter__(self) -> ShardWriter:
        with writing_to(self.path, STAYS):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "wb")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # closing writes what is still buffered, and the disk may be full
            self._file.close()
        self._partial.unlink(missing_ok=True)

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
        """Sync and move into place, the table first.

        The tar's presence with the size that stands there makes the shard whole.
        """
        with writing_to(self.path, STAYS):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            whole = {**table, "size": self._file.tell(), "places": self._places}
            write_json(self.path.with_suffix(".json"), whole, indent=None)
            os.replace(self._partial, self.path)
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
