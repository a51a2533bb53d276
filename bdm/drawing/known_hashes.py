"""Hashes of files, which are noted so that gigabytes are read once."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..files import atomic_write, cache_folder
from ..formats.folders import weight_files
from ..formats.hashes import file_hashes, source_hash
from ..plugins.control_images import open_picture


def known_hash(path: Path, kind: str) -> str:
    """The hash by which a file or folder is known (see ``bdm.plugins.Plugin.hash``).

    It is noted in the user's cache by place, size and time.

    Args:
        path: the file or folder.
        kind: of the plug-in; an adapter's is that of its tensors' data.

    Raises:
        OSError: it cannot be read.
    """
    return known_hashes(path)["data hash" if kind == "adapter" and _has_data_hash(path) else "hash"]


def known_hashes(path: Path) -> dict[str, str]:
    """All hashes of a file or folder: "hash" of ten digits, for single files "sha256", and "data hash"."""
    note = _note(path)
    with suppress(OSError, ValueError):
        found: Any = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(text, str) for text in found.values()):
            return found
    hashes = file_hashes(path) if path.is_file() else {}
    hashes["hash"] = hashes.pop("model hash", "") or source_hash(path)
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(note, shared=True) as partial:
            partial.write_text(json.dumps(hashes), encoding="utf-8")
    return hashes


def is_noted(path: Path) -> bool:
    """Whether a file's hashes are known without reading it."""
    return _note(path).is_file()


def _has_data_hash(path: Path) -> bool:
    return path.is_file() and "data hash" in known_hashes(path)


def _note(path: Path) -> Path:
    """Where the hashes of a file or folder are noted, as it is now."""
    real = Path(os.path.realpath(path))
    files = [real] if real.is_file() else _weights_below(real)
    states = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    key = hashlib.sha256(json.dumps(states).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return cache_folder() / "hashes" / f"{key}.json"


def _weights_below(folder: Path) -> list[Path]:
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    return sorted(path for inside in folders for path in weight_files(inside))


def picture_hash(picture: Image.Image | Path) -> str:
    """The hash of a picture's pixels, whatever else its file says.

    Raises:
        UserError: the file is missing, or no picture.
    """
    opened = open_picture(picture) if isinstance(picture, Path) else picture
    digest = hashlib.sha256(f"{opened.mode} {opened.size}".encode())
    digest.update(opened.tobytes())
    return digest.hexdigest()[:16]


def is_picture_of(path: Path, wanted: str) -> bool:
    """Whether a file is a picture of a hash."""
    try:
        return picture_hash(path) == wanted
    except UserError:
        return False
