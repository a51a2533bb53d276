"""A request's own pipeline: everything is its own but the networks, whose calls others make."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from ..plugins import Plugins
from .deputies import Ask, deputy


class OwnAdapters:
    """A pipeline's plug-ins as a drawing sees them whose adapters are its own.

    Their strengths are in force already, so those that its prompts name change nothing.

    Args:
        plugins: of the pipeline.
        names: of the drawing's adapters.
    """

    def __init__(self, plugins: Plugins, names: Collection[str]) -> None:
        self._plugins, self._names = plugins, names

    def __iter__(self) -> Iterator[Any]:
        return iter(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(name=name, kind="adapter")

    def during_call(
        self, control_images: Any, strength: Any, *others: Any, **more: Any
    ) -> AbstractContextManager[None]:
        """Without strengths (see ``Plugins.during_call``)."""
        return self._plugins.during_call(control_images, None, *others, **more)


def own_pipeline(pipe: Any, scheduler: Any, ask: Ask, adapters: Collection[str] | None = None) -> Any:
    """A pipeline around the parts of another, for one drawing.

    Args:
        pipe: whose networks and plug-ins they are.
        scheduler: of the drawing alone.
        ask: gets the calls of UNet and branch.
        adapters: names of the drawing's, where their strengths are not the pipeline's; None where they are.
    """
    parts = {"unet": deputy(pipe.unet, ask)}
    if pipe.branch is not None:
        parts["branch"] = deputy(pipe.branch, ask)
    # Of the VAE a copy with the same weights, because a large picture has it work in tiles.
    made = type(pipe).from_pipe(pipe, scheduler=scheduler, vae=copy.copy(pipe.vae), **parts)
    made._plugins = pipe.plugins if adapters is None else OwnAdapters(pipe.plugins, adapters)
    made.set_progress_bar_config(disable=True)
    return made
