"""A request's plug-ins on a pipeline, and what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError, first_line
from ..pipeline.ip_adapter import ip_adapter
from ..plugins.controlnet import annotate, open_picture
from ..text.routing import route
from .request import PluginUse, Request

#: An embedding's words are known before a checkpoint comes; adapters are laid upon the checkpoint.
_ORDER = ("embedding", "checkpoint", "vae", "adapter", "controlnet", "ip_adapter")


def attach(pipe: Any, plugins: Sequence[PluginUse], stack: ExitStack) -> dict[str, Image.Image]:
    """Attach plug-ins to a pipeline that has none; returns the ControlNets' conditions, by name.

    Args:
        pipe: the pipeline.
        plugins: of a complete request.
        stack: is closed before the plug-ins are detached; takes an IP-Adapter off.

    Raises:
        UserError: a file that does not fit; some may be attached then.
    """
    for plugin in sorted(plugins, key=lambda plugin: _ORDER.index(plugin.kind)):
        if plugin.kind == "ip_adapter":
            encoder = plugin.encoder and _image_encoder(Path(str(plugin.encoder.source)), pipe)
            acting = ip_adapter(pipe, str(plugin.file.source), plugin.strength, encoder)
            stack.enter_context(acting)
            continue
        pipe.plugins.attach(str(plugin.file.source), plugin.name, kind=plugin.kind, **_settings(plugin))
    return conditions_of(plugins)


def conditions_of(plugins: Sequence[PluginUse]) -> dict[str, Image.Image]:
    """The conditions of a complete request's ControlNets, by name.

    Raises:
        UserError: there is none, or it cannot be opened.
    """
    return {plugin.name: _condition(plugin) for plugin in plugins if plugin.kind == "controlnet"}


def shown_picture(plugins: Sequence[PluginUse]) -> dict[str, Any]:
    """What a call is told of an IP-Adapter's picture.

    Raises:
        UserError: there is none, or it cannot be opened.
    """
    for plugin in plugins:
        if plugin.kind == "ip_adapter":
            if plugin.picture is None:
                raise UserError("the IP-Adapter has no picture to show; give it one")
            return {"ip_adapter_image": open_picture(str(plugin.picture.source))}
    return {}


def _image_encoder(folder: Path, pipe: Any) -> Any:
    """A folder's image encoder, where the pipeline computes; nothing in it is executed."""
    from transformers import CLIPVisionModelWithProjection

    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=pipe.unet.dtype
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} holds no image encoder ({first_line(error)}); give the folder of a"
            " CLIPVisionModelWithProjection as safetensors, such as models/image_encoder of an IP-Adapter"
        ) from None
    return encoder.to(pipe.unet.device)


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
