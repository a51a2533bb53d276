"""What there is to say of the files in folders of models, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..formats.header import read_header
from ..formats.identify import identify_source
from .known_hashes import is_noted, known_hash
from .library import Library
from .model_folders import Entry
from .picture_names import ENDINGS
from .trigger_words import trigger_words

#: What is said of each file.
COLUMNS = ("name", "kind", "base", "trigger words", "hash", "preview", "cached", "file")
#: Endings of the pictures that show what a file draws, behind its stem.
_PREVIEWS = tuple(f"{infix}{ending}" for infix in (".preview", "") for ending in ENDINGS)


def list_models(library: Library) -> Iterator[dict[str, str]]:
    """What the files in the folders of a library are, in the columns of ``COLUMNS``.

    "cached" says whether a file's hash was noted before; hashes are read once (see
    ``bdm.drawing.known_hashes``). Files that cannot be read are listed with what is wrong in place of a base.
    """
    for entry in library:
        yield {"name": entry.path.stem if entry.path.is_file() else entry.path.name, **_facts(entry)}


def _facts(entry: Entry) -> dict[str, str]:
    path = entry.path
    try:
        found = identify_source(path)
        kind, base = found.kind, found.base or _noted_base(path)
        noted = is_noted(path)
        shown = known_hash(path, kind)
    except (UserError, OSError) as error:
        # The message begins with the path, which has a column of its own.
        why = str(error).removeprefix(str(path)).strip(" :")
        kind, base, noted, shown = entry.kind or "unknown", f"cannot be read: {why}", False, ""
    if kind == "unknown" and entry.kind:
        kind = entry.kind
    return {
        "kind": kind,
        "base": base,
        "trigger words": ", ".join(_words(path, kind)),
        "hash": shown,
        "preview": _preview(path),
        "cached": "yes" if noted else "no",
        "file": str(path),
    }


def _words(path: Path, kind: str) -> list[str]:
    return [path.stem] if kind == "embedding" else trigger_words(path) if kind == "adapter" else []


def _noted_base(path: Path) -> str:
    """The base that a trainer noted, for adapters whose shapes tell none."""
    if path.suffix.lower() != ".safetensors":
        return ""
    noted = read_header(path).metadata
    return noted.get("ss_base_model_version") or noted.get("modelspec.architecture") or ""


def _preview(path: Path) -> str:
    """The name of the picture beside a file that shows what it draws."""
    stem = path.with_suffix("") if path.is_file() else path
    pictures = (stem.parent / f"{stem.name}{ending}" for ending in _PREVIEWS)
    return next((picture.name for picture in pictures if picture.is_file()), "")
