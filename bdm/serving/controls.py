"""ControlNets of a batch: its drawings share the networks, and each has pictures and strengths of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..drawing.request import PluginUse, Request
from ..plugins.controlnet import ControlNetHook, control_settings
from .deputies import Ask, deputy

#: What a ControlNet is loaded from: its file's hash, where it lies, and whether it pools its residuals.
Source = tuple[str, str, bool | None]


def without_controls(plugins: Sequence[PluginUse]) -> tuple[PluginUse, ...]:
    """The plug-ins that are no ControlNets."""
    return tuple(plugin for plugin in plugins if plugin.kind != "controlnet")


class BatchControls:
    """The ControlNets of a batch.

    A drawing hangs its own hooks on its own deputy of the UNet. A ControlNet is called by the drawings whose
    window and strength have it act in their step, so those that have none call none.

    Args:
        pipe: with the plug-ins of the first drawing in it.
        request: that drawing's.
    """

    def __init__(self, pipe: Any, request: Request) -> None:
        attached = dict(pipe.plugins.controlnets)
        self._networks: dict[Source, Any] = {}
        for use in _uses(request):
            self._networks.setdefault(_source(use), attached.pop(use.name).controlnet)
        self._others = attached  # of whoever gave the pipeline: they want pictures, which no request has

    @property
    def networks(self) -> list[Any]:
        """Each once, in the order of the first drawing."""
        return list(self._networks.values())

    def has(self, request: Request) -> bool:
        """Whether the ControlNets of a complete request are all here."""
        return all(_source(use) in self._networks for use in _uses(request))

    def hooks(self, request: Request, ask: Ask) -> dict[str, ControlNetHook]:
        """A drawing's own hooks, by name.

        Args:
            request: complete; its ControlNets are here.
            ask: gets the calls of the ControlNets.

        Raises:
            UserError: a strength or a window that is none.
        """
        return self._others | {
            use.name: ControlNetHook(
                deputy(self._networks[_source(use)], ask),
                **control_settings(use.strength, use.start, use.end),
            )
            for use in _uses(request)
        }


def _uses(request: Request) -> list[PluginUse]:
    return [plugin for plugin in request.plugins if plugin.kind == "controlnet"]


def _source(use: PluginUse) -> Source:
    return use.file.hash, str(use.file.source), use.pooled
