"""Where branches and native text encoders lie: folders of their own among ComfyUI's models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths

from bdm.errors import UserError, quoted
from bdm.extras import is_installed
from bdm.text.packaged import NAME_FILE, PACKAGED

BRANCHES, TEXTS = "bdm_branches", "bdm_text"
#: A model lies at most so many folders deep: ``bdm_branches/emoji/branch`` is two.
DEEPEST = 4


def register_folders() -> None:
    """Tell ComfyUI of the folders ``models/bdm_branches`` and ``models/bdm_text``.

    Those that ``extra_model_paths.yaml`` names under these words stay beside them.
    """
    for kind in (BRANCHES, TEXTS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))


def list_models(kind: str) -> list[str]:
    """What can be chosen: folders and files under the kind's folders, and packages with a text encoder.

    Args:
        kind: ``BRANCHES`` or ``TEXTS``.
    """
    found = {name for root in folder_paths.get_folder_paths(kind) for name in _names(Path(root), kind)}
    packages = [one.name for one in PACKAGED.values() if is_installed(one.module)] if kind == TEXTS else []
    return sorted(found | set(packages))


def find_model(kind: str, name: str) -> Path | str:
    """The path of what was chosen; a package's name for itself.

    Raises:
        UserError: nothing of that name is listed, so that no name leads out of the folders.
    """
    listed = list_models(kind)
    if name not in listed:
        raise UserError(
            f"models/{kind} has no {quoted(name)}; there are {', '.join(listed) or 'none'}. Put it there and"
            " refresh the nodes (key R)"
        )
    places = [Path(root) / name for root in folder_paths.get_folder_paths(kind)]
    return next((place for place in places if place.exists()), name)


def _names(root: Path, kind: str) -> Iterator[str]:
    fits = _IS[kind]
    for folder, inside, files in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root)
        if len(here.parts) >= DEEPEST:
            inside.clear()
        if here.parts and fits(Path(folder)):
            yield here.as_posix()
        elif kind == TEXTS:
            yield from ((here / file).as_posix() for file in files if file.endswith(".pt"))


def _is_branch(folder: Path) -> bool:
    return _said(folder).get("_class_name") in ("BranchModel", "ControlNetModelBDM")


def _is_text(folder: Path) -> bool:
    return "model_type" in _said(folder) or (folder / NAME_FILE).is_file()


_IS: dict[str, Callable[[Path], bool]] = {BRANCHES: _is_branch, TEXTS: _is_text}


def _said(folder: Path) -> dict[str, object]:
    """A folder's configuration; nothing where there is none that can be read."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
