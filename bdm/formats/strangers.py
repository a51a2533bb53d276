"""What a file is that holds no weights: pictures, failed downloads, archives, texts."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..errors import printable

#: How files of other kinds begin, what they are, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "get it with `git lfs pull`"),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", ""),
    (b"\xff\xd8\xff", "a picture (JPEG)", ""),
    (b"GIF8", "a picture (GIF)", ""),
    (b"II*\x00", "a picture (TIFF)", ""),
    (b"MM\x00*", "a picture (TIFF)", ""),
    (b"GGUF", "a GGUF file", "give the model as safetensors"),
    (b"\x89HDF\r\n", "an HDF5 file", "give the model as safetensors"),
    (b"%PDF-", "a PDF", ""),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"PAR1", "a parquet file", ""),
)  # fmt: skip
_ZIP = b"PK\x03\x04"
_WEB = (b"<!doctype html", b"<html", b"<head", b"<?xml")
#: Bytes of a file's beginning that tell what it is; texts in a PNG stand before its picture.
_LOOKED_AT = 1 << 16
#: Texts in a picture that tell how it was made, by whom they are written.
_NOTES = (b"bdm\x00", b"parameters\x00")


def stranger(path: Path) -> str:
    """What a file is, and what to do with it, where it is plainly none of weights; else "".

    Args:
        path: of a file that exists.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_LOOKED_AT)
    if not start:
        return "an empty file; get it again"
    for beginning, what, advice in _BEGINNINGS:
        if start.startswith(beginning):
            return f"{what}{_noted(start) if 'picture' in what else ''}; {advice or 'give a file of weights'}"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return f"a picture (WebP){_noted(start)}; give a file of weights"
    if start[4:12] in (b"ftypavif", b"ftypheic"):
        return "a picture (AVIF or HEIC); give a file of weights"
    if start.startswith(_ZIP):
        return _archive(path)
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if plain[:20].lower().startswith(_WEB):
        return "a web page, as where a download needs a login; download the file itself"
    return _text(start)


def _noted(start: bytes) -> str:
    """That a picture says how it was made; programs that draw show it."""
    if any(note in start for note in _NOTES):
        return ", whose text `parameters` tells how it was made (A1111's PNG Info shows it)"
    return ""


def _archive(path: Path) -> str:
    """A zip archive that torch did not write; "" for its own and for damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # whatever is wrong with it, its reader says
        return ""
    if any(name.endswith("data.pkl") for name in names):
        return ""
    first = f" of {len(names)} files, such as {printable(names[0], 60)!r}" if names else " without files"
    return f"a zip archive{first}; unpack it first"


def _text(start: bytes) -> str:
    """A text, by its first kilobyte; "" where it is none."""
    try:
        text = start[:1024].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(start), 1024) - 3:  # not a character that the limit has cut in two
            return ""
        text = start[: error.start].decode("utf-8")
    if not text.strip() or any(not c.isprintable() and c not in "\t\r\n\f\ufeff" for c in text):
        return ""
    line = text.strip().splitlines()[0]
    return f"a text that begins with {printable(line, 60)!r}; give a file of weights"
