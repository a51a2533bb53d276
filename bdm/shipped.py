"""What is shipped beside the code: the weights in ``assets/`` and the configurations in ``configs/``.

Both lie in the top folder of a checkout, and inside the package where it was installed from a wheel.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path

#: The folders that are shipped.
FOLDERS = ("assets", "configs")


@cache
def _home() -> Path:
    package = Path(str(files("bdm")))
    return package if (package / FOLDERS[0]).is_dir() else package.parent


def shipped(name: str) -> Path:
    """Where something shipped lies, such as ``assets/emoji``."""
    return _home() / name


def find_path(path: str | Path) -> Path:
    """A path as it is given or, where nothing lies there, what is shipped under that very name."""
    path = Path(path)
    # Names may be of any length.
    if os.path.exists(path) or path.parts[:1] not in [(folder,) for folder in FOLDERS] or ".." in path.parts:
        return path
    found = _home() / path
    return found if found.exists() else path
