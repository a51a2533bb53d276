"""A request's plug-ins on a pipeline, and what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..errors import UserError
from ..plugins.controlnet import annotate, open_picture
from ..text.routing import route
from .request import PluginUse, Request

#: An embedding's words are known before a checkpoint comes; adapters are laid upon the checkpoint.
_ORDER = ("embedding", "checkpoint", "vae", "adapter", "controlnet")


def attach(pipe: Any, plugins: Sequence[PluginUse]) -> dict[str, Image.Image]:
    """Attach plug-ins to a pipeline that has none; returns the ControlNets' conditions, by name.

    Raises:
        UserError: a file that does not fit; some may be attached then.
    """
    conditions: dict[str, Image.Image] = {}
    for plugin in sorted(plugins, key=lambda plugin: _ORDER.index(plugin.kind)):
        pipe.plugins.attach(str(plugin.file.source), plugin.name, kind=plugin.kind, **_settings(plugin))
        if plugin.kind == "controlnet":
            conditions[plugin.name] = _condition(plugin)
    return conditions


def needs_english(request: Request) -> bool:
    """Whether the English text encoder has more to say than what "" means to it."""
    kinds = {plugin.kind for plugin in request.plugins}
    said = request.prompt_en or request.negative_en or request.clip_skip != 1
    rules = request.rules
    if rules.routing and rules.emphasis == "a1111":
        said = said or any(route(text, "").moved for text in (request.prompt, request.negative))
    return bool(said or kinds - {"vae"})


def _settings(plugin: PluginUse) -> dict[str, Any]:
    """What a plug-in's attachment is told."""
    if plugin.kind == "adapter":
        return {"strength": plugin.strength, "text_strength": plugin.text_strength}
    if plugin.kind == "controlnet":
        window = {"strength": plugin.strength, "start": plugin.start, "end": plugin.end}
        return window if plugin.pooled is None else window | {"pooled": plugin.pooled}
    return {}


def _condition(plugin: PluginUse) -> Image.Image:
    if plugin.picture is None:
        raise UserError(f"{plugin.name} has no control image; give one image for each ControlNet")
    return annotate(open_picture(str(plugin.picture.source)), plugin.annotator)
