"""Imports point one way, along the data flow."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bdm"
#: From what everything may use to what nothing may use; a module imports from earlier entries (or its own) only.
ORDER = [
    "errors", "extras", "config", "weights", "checkpoint", "formats", "grid", "picture_info", "loss", "samplers", "data", "text",
    "fingerprint", "backbone", "branch", "sharing", "folding", "packing", "bridge", "controlnet", "plugins", "averaging",
    "optimizers", "parallel", "metrics", "pipeline", "convert", "assemble", "stopping", "evaluate.judge", "recipes", "plan",
    "prepare", "training", "evaluate", "bench", "cli",
]  # fmt: skip


def place(module: str) -> int:
    return max(
        (ORDER.index(name) for name in ORDER if module == name or module.startswith(name + ".")), key=lambda i: len(ORDER[i])
    )


def test_imports_point_one_way():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) == 1:
            continue
        here = ".".join(p for p in parts if p != "__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                target = ".".join([*parts[: len(parts) - node.level], node.module])
                assert place(target) <= place(here), f"{here} imports {target}"
                checked += 1
    assert checked > 30
