"""Hashes by which others know a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .folders import weight_files
from .header import looks_like_safetensors


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a file, and of its tensor data alone for safetensors (what A1111 shows for LoRA files)."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    has_header = looks_like_safetensors(path)
    with open(path, "rb") as file:
        if has_header:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            whole.update(length + header)
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            if has_header:
                data.update(chunk)
    hashes = {"sha256": whole.hexdigest(), "model hash": whole.hexdigest()[:10]}
    return hashes | ({"data hash": data.hexdigest()[:12]} if has_header else {})


def source_hash(source: Path) -> str:
    """The first ten digits of a file's SHA-256; of a folder's weight files together (those that are read)."""
    if source.is_file():
        return file_hashes(source)["model hash"]
    together = hashlib.sha256()
    folders = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for path in sorted(path for folder in folders for path in weight_files(folder)):
        together.update(file_hashes(path)["sha256"].encode())
    return together.hexdigest()[:10]
