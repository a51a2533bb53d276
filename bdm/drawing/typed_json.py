"""Frozen records -> JSON and back, exactly. What a record does not know is refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, TypeVar, cast

from ..errors import UserError, printable, quoted

Record = TypeVar("Record")

_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def to_plain(value: Any) -> Any:
    """A record as dictionaries, lists and scalars, without the fields that are not part of its JSON."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in _fields(type(value))}
    return [to_plain(inner) for inner in value] if isinstance(value, tuple) else value


def from_plain(kind: type[Record], said: Any, where: str = "the request") -> Record:
    """A record out of what ``to_plain`` gave for its fields, or a part of them; the rest are the defaults.

    Args:
        kind: the record's class, a dataclass.
        said: a JSON value.
        where: for messages.

    Raises:
        UserError: names the first key that is unknown, missing or of another kind.
    """
    if not isinstance(said, Mapping):
        raise UserError(f"{where} is {quoted(said)}; give an object")
    fields = {field.name: field for field in _fields(cast(Any, kind))}
    for key in said:
        if key not in fields:
            raise UserError(f"{where} says {quoted(key)}; allowed are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in said and _is_needed(field):
            raise UserError(f"{where} does not say {name}, which is needed")
    kinds = _types(kind)
    return kind(**{key: read_as(kinds[key], value, f"{where}, {key},") for key, value in said.items()})


def read_as(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a field's type.

    Args:
        kind: a scalar's, a record's, a tuple's, or one of these or None.
        value: the value.
        where: for messages.

    Raises:
        UserError: it is of another kind.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (wanted,) = [one for one in inner if one is not type(None)]
        return None if value is None else read_as(wanted, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {quoted(value)}; give a list")
        return tuple(read_as(inner[0], one, f"{where} item {i}") for i, one in enumerate(value, 1))
    if kind in _KINDS:
        return _scalar(kind, value, where)
    read = getattr(kind, "from_json", None) or partial(from_plain, kind)
    return read(value, where.rstrip(","))


def _scalar(kind: type, value: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) < 1e300 and math.isfinite(value):
        return float(value)
    if type(value) is not kind or (kind is float and number):
        allowed = "a finite number" if kind is float and number else _KINDS[kind]
        raise UserError(f"{where} is {quoted(value)}; give {allowed}")
    if isinstance(value, str) and has_half_characters(value):
        raise UserError(f"{where} {printable(value, 60)!r} holds half a character; write it anew")
    return value


def has_half_characters(text: str) -> bool:
    """Whether a text holds halves of characters (lone surrogates), which no encoding takes."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if not field.metadata.get("unsaid")]


@cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
