"""The messages of the package's code, as they are written there, with ``{}`` for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "bdm"
_ERRORS = ("UserError", "RowsFailed", "ArgumentTypeError")


def messages(room: str) -> Iterator[tuple[str, str]]:
    """(where, template) of what a room raises as a user's error or says as a warning.

    A part that is chosen, as ``a if b else c``, is given in all its ways.
    """
    place = PACKAGE / room
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and _is_message(node.func):
                for template in _templates(node.args[0]):
                    if re.search(r"[a-z]{2}", template):
                        yield f"{path.relative_to(PACKAGE)}:{node.lineno}", template


def _is_message(called: ast.expr) -> bool:
    if isinstance(called, ast.Attribute):
        logs = isinstance(called.value, ast.Name) and called.value.id in ("logging", "logger", "log")
        return called.attr in _ERRORS or (called.attr == "warning" and logs)
    return isinstance(called, ast.Name) and called.id in _ERRORS


def _templates(node: ast.expr) -> list[str]:
    """All texts that an expression may be."""
    match node:
        case ast.Constant(value=str(text)):
            return [re.sub(r"%(?:\.\d+)?[sdrgf]", "{}", text)]
        case ast.JoinedStr(values=values):
            return _joined(values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _joined([left, right])
        case ast.IfExp(body=body, orelse=orelse):
            return [*_templates(body), *_templates(orelse)]
    return ["{}"]


def _joined(values: list[ast.expr]) -> list[str]:
    found = [""]
    for value in values:
        inner = value.value if isinstance(value, ast.FormattedValue) else value
        texts = (
            ["{}"] if isinstance(value, ast.FormattedValue) and not _is_chosen(inner) else _templates(inner)
        )
        found = [before + text for before in found for text in texts]
    return found


def _is_chosen(node: ast.expr) -> bool:
    return isinstance(node, ast.IfExp)
