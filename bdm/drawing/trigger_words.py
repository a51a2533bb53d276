"""Words that a file acts on, as its trainer or its page noted them, and which of them a prompt lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.adapter import adapter_metadata
from ..formats.bundled import bundled_embeddings
from ..formats.header import read_header
from ..text.routing import route
from .request import PluginUse, Request


def trigger_words(path: Path) -> list[str]:
    """The words of an adapter: those of a note beside it, else of its own header.

    Notes are Civitai's (``ink.civitai.info``) and A1111's (``ink.json`` with "activation text"). The header
    tells a phrase, or the most frequent tags of what it was trained on.
    """
    for note in (path.with_suffix(".civitai.info"), path.with_suffix(".json")):
        said = _json(note)
        words = said.get("trainedWords") or said.get("activation text")
        if words:
            return _split([words] if isinstance(words, str) else [str(word) for word in words])
    if path.suffix.lower() != ".safetensors":
        return []
    try:
        file = read_header(path)
        noted = adapter_metadata(path, file.metadata).get("trigger words", "")
        return [*_split([noted]), *bundled_embeddings(file)]
    except UserError:
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _split(texts: Iterable[str]) -> list[str]:
    words = [word.strip() for text in texts for word in text.split(",")]
    return list(dict.fromkeys(filter(None, words)))


def lacking(requests: Iterable[Request]) -> dict[str, list[str]]:
    """The words of adapters and embeddings of which no request's English prompts hold any, by plug-in."""
    found: dict[str, list[str]] = {}
    said: dict[str, set[str]] = {}
    for request in requests:
        english = f"{request.prompt_en} {request.negative_en}"
        for plugin in request.plugins:
            if plugin.kind == "embedding":
                found.setdefault(plugin.name, [plugin.name])
            elif plugin.kind == "adapter" and plugin.file.source and plugin.name not in found:
                found[plugin.name] = trigger_words(plugin.file.source)
            said.setdefault(plugin.name, set()).add(f"{english} {_routed(request, plugin)}")
    return {
        name: words
        for name, words in found.items()
        if words and not any(_holds(text, word) for text in said[name] for word in words)
    }


def _routed(request: Request, plugin: PluginUse) -> str:
    """An embedding's name where it acts on the English side out of the native prompts."""
    rules = request.rules
    if plugin.kind != "embedding" or not rules.routing or rules.emphasis != "a1111":
        return ""
    texts = (request.prompt, request.negative)
    return " ".join(word for text in texts for word in route(text, "", [plugin.name]).moved)


def _holds(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None
