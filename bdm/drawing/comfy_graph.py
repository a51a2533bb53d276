"""ComfyUI's ``prompt`` in a picture: what its graph of nodes says of the drawing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError

#: What samplers say, under ComfyUI's names.
_SAMPLING = ("seed", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
#: Nodes between a sampler's prompt and the text at most.
_FARTHEST = 50

Node = Mapping[str, Any]


def graph_lines(said: str) -> list[str]:
    """What a graph says, for people.

    Samplers with their prompts, sizes, the files that it loads, and how many nodes of each kind there are.

    Args:
        said: the text that ComfyUI writes as "prompt".

    Raises:
        UserError: it is no graph.
    """
    nodes = _nodes(said)
    lines = [line for node in nodes.values() for line in _sampler_lines(node, nodes)]
    for node in nodes.values():
        inputs = _inputs(node)
        if {"width", "height"} <= inputs.keys() and not _is_sampler(node):
            lines.append(f"Size: {inputs['width']}x{inputs['height']}")
        lines += [f"{name}: {value}" for name, value in inputs.items() if _names_a_file(name, value)]
    kinds = Counter(node["class_type"] for node in nodes.values())
    return [*lines, "Nodes: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))]


def _nodes(said: str) -> dict[str, Node]:
    try:
        found = json.loads(said)
        nodes = {str(name): node for name, node in found.items() if isinstance(node["class_type"], str)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError("the ComfyUI prompt in the picture is no graph of nodes") from None
    if not nodes:
        raise UserError("the ComfyUI prompt in the picture has no nodes")
    return nodes


def _inputs(node: Node) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _is_sampler(node: Node) -> bool:
    return {"positive", "steps"} <= _inputs(node).keys()


def _sampler_lines(node: Node, nodes: Mapping[str, Node]) -> Iterator[str]:
    if not _is_sampler(node):
        return
    inputs = _inputs(node)
    said = [
        f"{name}: {inputs[name]}" for name in _SAMPLING if isinstance(inputs.get(name), str | int | float)
    ]
    yield f"{node['class_type']}: {', '.join(said)}"
    for side in ("positive", "negative"):
        for text in _texts(inputs.get(side), nodes, _FARTHEST):
            yield f"{side}: {text}"


def _texts(link: Any, nodes: Mapping[str, Node], left: int) -> Iterator[str]:
    """The texts behind a link, through whatever nodes stand between."""
    node = nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None
    if node is None or left == 0:
        return
    for name, value in _inputs(node).items():
        if isinstance(value, str) and ("text" in name or "prompt" in name):
            yield value
        elif isinstance(value, list) and (
            "cond" in name or "text" in name or name in ("positive", "negative")
        ):
            yield from _texts(value, nodes, left - 1)


def _names_a_file(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.endswith("_name") and "sampler" not in name
