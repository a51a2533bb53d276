"""A request's own pipeline: everything is its own but the networks, whose calls others make."""

from __future__ import annotations

import copy
from typing import Any

from .deputies import Ask, deputy


def own_pipeline(pipe: Any, scheduler: Any, ask: Ask) -> Any:
    """A pipeline around the parts of another, for one drawing.

    Args:
        pipe: whose networks and plug-ins they are.
        scheduler: of the drawing alone.
        ask: gets the calls of UNet and branch.
    """
    parts = {"unet": deputy(pipe.unet, ask)}
    if pipe.branch is not None:
        parts["branch"] = deputy(pipe.branch, ask)
    # Of the VAE a copy with the same weights, because a large picture has it work in tiles.
    made = type(pipe).from_pipe(pipe, scheduler=scheduler, vae=copy.copy(pipe.vae), **parts)
    made._plugins = pipe.plugins
    made.set_progress_bar_config(disable=True)
    return made
