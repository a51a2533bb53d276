"""Recipes and data of other packages, by name: "package.module:Class".

Their code is run, as any package's that one imports: a configuration that names one is trusted like it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ...data.source import Source
from ...errors import UserError, first_line
from .base import Recipe

#: What a source must have (see ``Source``).
_OF_SOURCES = ("__len__", "__getitem__", "caption", "validation")


def module_recipe(
    source: Source, target: str, arguments: Mapping[str, Any] | None = None, *, seed: int = 0
) -> Recipe:
    """A recipe of another package.

    Args:
        source: the examples; its first argument.
        target: "package.module:Class", or a function that makes one.
        arguments: further ones, by name.
        seed: of the run; passed on.

    Raises:
        UserError: it cannot be found or made, or is no ``Recipe``.
    """
    made = _make("recipe", target, source, **{**(arguments or {}), "seed": seed})
    if not isinstance(made, Recipe):
        raise UserError(
            f"recipe.target {target} gives a {type(made).__name__}; it must be a"
            " bdm.training.recipes.base.Recipe"
        )
    return made


def module_source(target: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """A data source of another package.

    Args:
        target: "package.module:Class", or a function that makes one.
        arguments: its arguments, by name.

    Raises:
        UserError: it cannot be found or made, or is no ``Source``.
    """
    made = _make("data", target, **(arguments or {}))
    missing = [name for name in _OF_SOURCES if not hasattr(made, name)]
    if missing:
        raise UserError(
            f"data.target {target} gives a {type(made).__name__} without {', '.join(missing)}; see"
            " bdm.data.source.Source for what a source has"
        )
    return made


def _make(key: str, target: str, *given: Any, **arguments: Any) -> Any:
    maker = find_target(key, target)
    try:
        inspect.signature(maker).bind(*given, **arguments)
    except TypeError as error:
        said = ", ".join(arguments) or "none"
        raise UserError(
            f"{key}.target {target} cannot take the arguments {said} ({first_line(error)}); correct"
            f" {key}.arguments"
        ) from None
    return maker(*given, **arguments)


def find_target(key: str, target: str) -> Any:
    """What "package.module:Class" names.

    Raises:
        UserError: it has another form, or there is no such module or name in it.
    """
    place, colon, name = target.partition(":")
    if not colon or not all(part.isidentifier() for part in (*place.split("."), *name.split("."))):
        raise UserError(f"{key}.target is {target!r}; give package.module:Class")
    try:
        found: Any = import_module(place)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}.target {target}: Python finds no module {error.name!r}; install its package, or start"
            " with PYTHONPATH set to the folder that holds it"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(
                f"{key}.target {target}: {place} has no {name}; correct the name behind the colon"
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}.target {target} is a {type(found).__name__}; give a class, or a function")
    return found
