"""Bridge Diffusion Models: native-language image generation on top of the English Stable Diffusion community.

Names are loaded when they are first used, so that ``import bdm`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drawing.draw import draw
    from .drawing.request import BranchUse, FileRef, Mode, PluginUse, Request
    from .errors import UserError
    from .method.branch import BranchModel, BranchOutput
    from .method.condition import NativeCondition
    from .models.samplers import make_scheduler
    from .pipeline import (
        BridgeControlNetPipeline,
        BridgeImg2ImgPipeline,
        BridgeInpaintPipeline,
        BridgePipeline,
    )
    from .plugins import Plugin, Plugins
    from .serving.engine import Engine
    from .speed.approximate import Approximation
    from .speed.bridge import Bridge
    from .text.native import NativeTextEncoder, NativeTextSettings
    from .text.rules import PromptRules

__version__ = "0.1.0"

_HOMES = {
    "Approximation": "speed.approximate",
    "BranchUse": "drawing.request",
    "FileRef": "drawing.request",
    "Mode": "drawing.request",
    "PluginUse": "drawing.request",
    "Request": "drawing.request",
    "draw": "drawing.draw",
    "BranchModel": "method.branch",
    "BranchOutput": "method.branch",
    "Bridge": "speed.bridge",
    "NativeCondition": "method.condition",
    "Engine": "serving.engine",
    "UserError": "errors",
    "BridgePipeline": "pipeline",
    "BridgeImg2ImgPipeline": "pipeline",
    "BridgeInpaintPipeline": "pipeline",
    "BridgeControlNetPipeline": "pipeline",
    "make_scheduler": "models.samplers",
    "Plugin": "plugins",
    "Plugins": "plugins",
    "NativeTextEncoder": "text.native",
    "NativeTextSettings": "text.native",
    "PromptRules": "text.rules",
}

__all__ = [
    "Approximation",
    "BranchModel",
    "BranchOutput",
    "BranchUse",
    "Bridge",
    "BridgeControlNetPipeline",
    "BridgeImg2ImgPipeline",
    "BridgeInpaintPipeline",
    "BridgePipeline",
    "Engine",
    "FileRef",
    "Mode",
    "NativeCondition",
    "NativeTextEncoder",
    "NativeTextSettings",
    "Plugin",
    "PluginUse",
    "Plugins",
    "PromptRules",
    "Request",
    "UserError",
    "draw",
    "make_scheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bdm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
