"""Imports point one way, along the data flow."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bdm"
#: From what everything may use to what nothing may use; a module imports from earlier entries (or its own)
#: only.
ORDER = [
    "errors",
    "extras",
    "files",
    "shipped",
    "config",
    "formats",
    "parallel",
    "text",
    "data",
    "emoji",
    "models",
    "method",
    "speed",
    "plugins",
    "pipeline",
    "convert",
    "assemble",
    "drawing",
    "training",
    "prepare",
    "evaluate",
    "plan",
    "bench",
    "cli",
]

#: What still runs back up: the bridge owns its savings.
BACKWARDS = {("method.bridge", "speed")}


def place(module: str) -> int:
    return ORDER.index(module.split(".")[0])


def imported(path: Path) -> list[str]:
    """The package's own modules that a file imports, however it says so, as "data.emoji"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix("bdm.") for alias in node.names if alias.name.startswith("bdm.")
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                here = [*parts[: len(parts) - node.level], *filter(None, [node.module])]
            elif (node.module or "").split(".")[0] == "bdm":
                here = (node.module or "").split(".")[1:]
            else:
                continue
            # Without a module, "from . import x" names modules itself.
            found += [".".join(here)] if here else names
    return found


def test_imports_point_one_way():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for target in imported(path):
            allowed = (".".join(parts), target.split(".")[0]) in BACKWARDS
            assert allowed or place(target) <= place(parts[0]), f"{'.'.join(parts)} imports {target}"
            checked += 1
    assert checked > 300


def test_every_way_to_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_text(
        "from .. import training\nfrom ..recipes import base\nfrom . import b\nimport bdm.cli.draw\nfrom"
        " bdm.plan import report\n"
    )
    assert imported(tmp_path / "data" / "a.py") == ["training", "recipes", "data", "cli.draw", "plan"]
