"""YAML files plus ``key=value`` overrides -> checked configurations.

Unknown keys and impossible combinations are refused before anything heavy happens. Only builders read these
classes; models and functions take plain arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..shipped import find_path

Config = TypeVar("Config", bound=BaseModel)
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
#: YAML reads an unquoted no as false.
MixedPrecision = Annotated[
    Literal["no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
]


class Strict(BaseModel):
    """Base of all configurations: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=value`` override to a nested dictionary; the value is read as YAML."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"override {override!r} is not of the form key=value, such as optimizer.steps=100")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a group of keys")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"override {override!r}: {text!r} is not a whole YAML value; close its brackets, or quote a text"
            " that begins with a "
            f"""sign: '{path}="..."'"""
        ) from None


def read_tree(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A YAML file, or a shipped one by its name, with ``key=value`` overrides; not yet checked.

    Raises:
        UserError: file missing or not YAML, or an override of another form.
    """
    try:
        tree = yaml.safe_load(find_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"config {path}: {error.strerror}; give the path of a YAML file, such as configs/quickstart.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds {type(tree).__name__}, not a mapping of keys to values")
    for override in overrides:
        _set(tree, override)
    return tree


def read_config(path: str | Path, overrides: Sequence[str], schema: type[Config]) -> Config:
    """Read a YAML file, or a shipped one by its name, apply ``key=value`` overrides and check the result.

    Raises:
        UserError: file missing, not YAML, unknown keys or values that are not allowed; every problem in one
            message.
    """
    tree = read_tree(path, overrides)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {_explain(e)}" for e in error.errors()
        )
        raise UserError(f"config {path}: {problems}") from None


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key (value {error['input']!r}); remove it or correct its spelling"
    return f"{error['msg'].removeprefix('Value error, ')} (seen: {str(error['input'])[:80]})"
