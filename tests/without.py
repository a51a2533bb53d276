"""Runs a command of ``bdm`` as if modules were missing: ``python tests/without.py scipy,cv2 infer ...``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from typing import Any


class Without:
    """A finder that does not find some modules, and is another one else."""

    def __init__(self, finder: Any, hidden: Iterable[str]) -> None:
        self._finder, self._hidden = finder, tuple(hidden)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == module or name.startswith(f"{module}.") for module in self._hidden):
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


if __name__ == "__main__":
    sys.meta_path[:] = [Without(finder, sys.argv[1].split(",")) for finder in sys.meta_path]
    from bdm.cli import main

    sys.exit(main(sys.argv[2:]))
