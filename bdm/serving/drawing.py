"""A request's own pipeline: everything is its own but the networks, whose calls others make."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any

from ..plugins import Plugins
from ..plugins.controlnet import ControlNetHook
from .deputies import Ask, deputy


class OwnPlugins:
    """A pipeline's plug-ins as a drawing sees them whose adapters and ControlNets are its own.

    The adapters' strengths are in force already, so those that its prompts name change nothing.

    Args:
        plugins: of the pipeline.
        names: of the drawing's adapters.
        controlnets: the drawing's hooks by name.
    """

    def __init__(
        self, plugins: Plugins, names: Collection[str], controlnets: Mapping[str, ControlNetHook]
    ) -> None:
        self._plugins, self._names, self._controlnets = plugins, names, controlnets

    def __iter__(self) -> Iterator[Any]:
        return iter(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(name=name, kind="adapter")

    def during_call(
        self, control_images: Any, strength: Any, *others: Any, **more: Any
    ) -> AbstractContextManager[None]:
        """Without strengths, with the ControlNets of the drawing (see ``Plugins.during_call``)."""
        return self._plugins.during_call(control_images, None, *others, **more, controlnets=self._controlnets)


def own_pipeline(
    pipe: Any,
    scheduler: Any,
    ask: Ask,
    adapters: Collection[str] | None = None,
    controlnets: Mapping[str, ControlNetHook] | None = None,
) -> Any:
    """A pipeline around the parts of another, for one drawing.

    Args:
        pipe: whose networks and plug-ins they are.
        scheduler: of the drawing alone.
        ask: gets the calls of UNet and branch.
        adapters: names of the drawing's, whose strengths are in force; None where all plug-ins are the
            pipeline's.
        controlnets: hooks by name, which are hung on the drawing's deputy of the UNet.
    """
    parts = {"unet": deputy(pipe.unet, ask)}
    if pipe.branch is not None:
        parts["branch"] = deputy(pipe.branch, ask)
    # Of the VAE a copy with the same weights, because a large picture has it work in tiles.
    made = type(pipe).from_pipe(pipe, scheduler=scheduler, vae=copy.copy(pipe.vae), **parts)
    for hook in (controlnets or {}).values():
        hook.attach(ExitStack(), made.unet)  # until the deputy goes, with the drawing
    made._plugins = pipe.plugins
    if adapters is not None:
        made._plugins = OwnPlugins(pipe.plugins, adapters, controlnets or {})
    made.set_progress_bar_config(disable=True)
    return made
