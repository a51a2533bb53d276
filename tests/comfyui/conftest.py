"""The node pack as ComfyUI imports it, on a stand-in for ComfyUI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
PACK = "bdm_nodes"


def _modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in (PACK, "comfy", "folder_paths")]


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """The pack's package, with models folders of its own."""
    monkeypatch.syspath_prepend(STAND_IN)
    import folder_paths

    folder_paths.models_dir = str(tmp_path / "models")
    folder_paths.known.clear()
    where = ROOT / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location(PACK, where, submodule_search_locations=[str(where.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in _modules():
            del sys.modules[name]
