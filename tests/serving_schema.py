"""Requests made from a server's own description of itself (OpenAPI): what fits it, and what nearly does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

#: What stands in for a value of any kind.
ODD = [None, True, 0, -1, 2**63, 10**400, 1.5, 1e308, "", "x", "龙", "\0", "../x", [], {}, [[]], {"a": {}}]
_TEXTS = ["", "龙", "a AND b", "(a:1.2)", "<lora:x:1>", "x" * 3000, "\u202e", "/etc/passwd", "Euler a"]


class Described:
    """The operations of a description.

    Args:
        description: of ``/openapi.json``.
        chance: picks values.
    """

    def __init__(self, description: dict[str, Any], chance: random.Random) -> None:
        self._said, self._chance = description, chance
        self.operations = [
            (path, method, operation)
            for path, methods in description["paths"].items()
            for method, operation in methods.items()
        ]

    def requests(self, count: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(method, address, how it is called), of each operation in turn."""
        for i in range(count):
            path, method, operation = self.operations[i % len(self.operations)]
            yield method, *self._request(path, operation)

    def _request(self, path: str, operation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        call: dict[str, Any] = {}
        for one in operation.get("parameters", []):
            value = self._value(one["schema"])
            if one["in"] == "path":
                path = path.replace("{" + one["name"] + "}", quote(_text(value), safe="") or "x")
            elif self._chance.random() < 0.7:
                call.setdefault("params", {})[one["name"]] = _text(value)
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content:
            body = json.dumps(self._value(content["application/json"]["schema"]))
            call |= {"content": self._torn(body), "headers": {"content-type": "application/json"}}
        elif self._chance.random() < 0.3:
            call["content"] = self._chance.randbytes(200)
        return path, call

    def _torn(self, body: str) -> str:
        """Now and then a body that ends in the middle."""
        return body[: self._chance.randrange(len(body) + 1)] if self._chance.random() < 0.05 else body

    def _value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """One that fits, or now and then anything."""
        chance = self._chance
        if chance.random() < 0.1 or depth > 6:
            return chance.choice(ODD)
        if "$ref" in schema:
            return self._value(self._said["components"]["schemas"][schema["$ref"].split("/")[-1]], depth)
        if "anyOf" in schema:
            return self._value(chance.choice(schema["anyOf"]), depth)
        if "enum" in schema or "const" in schema:
            return chance.choice(schema.get("enum") or [schema["const"]])
        if schema.get("type") == "object":
            return self._object(schema, depth)
        if schema.get("type") == "array":
            return [self._value(schema.get("items", {}), depth + 1) for _ in range(chance.randint(0, 3))]
        kinds: dict[Any, list[Any]] = {
            "string": _TEXTS,
            "integer": [0, 1, 2, 8, 32, 64, -1, 10**9, 2**64],
            "number": [0.0, 0.5, 1, 2.5, -3, 1e9, 1e300],
            "boolean": [True, False],
            "null": [None],
        }
        return chance.choice(kinds.get(schema.get("type"), ODD))

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        known, wanted = schema.get("properties", {}), schema.get("required", [])
        found = {
            name: self._value(one, depth + 1)
            for name, one in known.items()
            if self._chance.random() < (0.9 if name in wanted else 0.3)
        }
        if schema.get("additionalProperties", False) and self._chance.random() < 0.5:
            found[self._chance.choice(["unknown", "steps", "plugins", "mode", ""])] = self._chance.choice(ODD)
        return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)[:200]
