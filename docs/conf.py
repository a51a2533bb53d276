"""How the documentation is built: ``make docs``, or ``python -m sphinx -W -b html docs docs/_build``."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

# While Sphinx runs, pydantic cannot make models that take further keys; these are made before.
import_module("bdm.serving.server")

project = "bdm"
author = "the bdm authors"
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes = False  # "" is a prompt
highlight_language = "none"  # blocks that name no language are no code

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
suppress_warnings = [
    "ref.python"
]  # annotations say "Bridge", and there are two: the paper's, and ours around it
napoleon_use_ivar = True  # the fields of a dataclass are documented where its docstring lists them, once

html_theme = "furo"
html_title = "bdm"
html_show_copyright = False


def rooms() -> list[str]:
    """The entries of the package, in the order in which the README's tree lists them."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("\nbdm/\n")[2].partition("```")[0]
    names = re.findall(r"^  (\w+)(?:/|\.py) ", tree, flags=re.MULTILINE)
    return [name for name in names if name != "cli"]  # commands explain themselves with --help


def modules(room: str) -> list[str]:
    """The modules of a room, each after the package it is in."""
    folder = ROOT / "bdm" / room
    found = [path.relative_to(ROOT).with_suffix("").parts for path in folder.rglob("*.py")]
    names = {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in found}
    return sorted(names) or [f"bdm.{room}"]


def write_api_pages() -> None:
    """Write a page for each room into ``api/``, which git ignores."""
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    for room in rooms():
        lines = [f"bdm.{room}", "=" * 40]
        for module in modules(room):
            if module != f"bdm.{room}":
                lines += ["", module.removeprefix(f"bdm.{room}."), "-" * 40]
            lines += ["", f".. automodule:: {module}"]
            # A package hands on names; they are documented where they are defined.
            if not (ROOT / module.replace(".", "/")).is_dir():
                lines += ["   :members:", "   :special-members: __call__", "   :show-inheritance:"]
        page, text = folder / f"{room}.rst", "\n".join([*lines, ""])
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain English: (B, *shape), |a - b| and branch_* mark nothing up."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<!\\)([*|](?=\S)|_(?!\w))", r"\\\1", part) for part in parts[::2]]
        lines[i] = "``".join(parts)


def setup(app: Any) -> None:
    """What Sphinx calls: the pages of the rooms, and docstrings as they are meant."""
    write_api_pages()
    app.connect("autodoc-process-docstring", escape, priority=900)  # after napoleon has read the sections
