"""What each plug-in does to a route, and what is left of the content beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import PluginFilesConfig, RoutesConfig
from ..emoji.judge import JudgeModel
from ..emoji.world import World
from ..errors import UserError
from .combinations import NAMES, edge_picture, measure
from .route import Route
from .shares import Share
from .trials import Trial


def plugin_effects(
    route: Route, world: World, judge: JudgeModel, config: RoutesConfig, guidance: float
) -> tuple[dict[str, Share], dict[str, str]]:
    """Shares by plug-in, and why others were refused.

    ``NAME_effect`` is the share in which the plug-in shows, ``NAME_without`` the same without it, and
    ``NAME_content`` the top-1 of the concepts beside it.
    """
    assert config.plugins is not None
    concepts = _concepts(world, config)
    edges = _edges(route, world, concepts, config.seed)
    refused: dict[str, str] = {}
    shares: dict[str, Share] = {}
    bare = _draw(route, world, config, guidance, concepts, None, edges)
    plain = measure(judge, bare, concepts, edges, config.plugins)
    for name in NAMES:
        try:
            pictures = _draw(route, world, config, guidance, concepts, name, edges)
        except UserError as error:  # one that a route cannot take says nothing of the others
            refused[name] = str(error)
            continue
        found = measure(judge, pictures, concepts, edges, config.plugins)
        shares |= {
            f"{name}_effect": found[name],
            f"{name}_without": plain[name],
            f"{name}_content": found["content"],
        }
    return shares, refused


def plugged_pictures(
    route: Route, world: World, config: RoutesConfig, guidance: float, count: int
) -> dict[str, Tensor | None]:
    """Pictures (count, 3, H, W) with each plug-in; None where it was refused."""
    concepts = _concepts(world, config)[:count]
    edges = _edges(route, world, concepts, config.seed)
    pictures: dict[str, Tensor | None] = {}
    for name in NAMES:
        try:
            pictures[name] = _draw(route, world, config, guidance, concepts, name, edges)
        except UserError:
            pictures[name] = None
    return pictures


def _concepts(world: World, config: RoutesConfig) -> list[int]:
    shared = [i for i, c in enumerate(world.concepts) if c.group == "shared" and config.language in c.names]
    return sorted(random.Random(config.seed).sample(shared, min(config.controls, len(shared))))


def _edges(route: Route, world: World, concepts: Sequence[int], seed: int) -> list[Image.Image]:
    scale = 2 ** (len(route.pipe.vae.config["block_out_channels"]) - 1)
    return [edge_picture(world, i, route.pipe.unet.config["sample_size"] * scale, seed) for i in concepts]


def _draw(
    route: Route,
    world: World,
    config: RoutesConfig,
    guidance: float,
    concepts: Sequence[int],
    name: str | None,
    edges: Sequence[Image.Image],
) -> Tensor:
    """Pictures of concepts in the native language, with a plug-in and its words."""
    assert config.plugins is not None
    settings = (route, config.steps, guidance, config.batch, config.seed)
    trial = _trial(world, config, concepts, name)
    if name is None:
        return _drawn(*settings, trial, None)
    source, own = _settings(name, config.plugins, route, config.base)
    with route.attached(source, None if name == "embedding" else name, **own):
        return _drawn(*settings, trial, edges if name == "controlnet" else None)


def _drawn(
    route: Route, steps: int, guidance: float, batch: int, seed: int, trial: Trial, edges: Any
) -> Tensor:
    with torch.no_grad():
        return route.draw(trial, steps, guidance, batch, seed, edges)


def _trial(world: World, config: RoutesConfig, concepts: Sequence[int], name: str | None) -> Trial:
    assert config.plugins is not None
    words = {"lora": config.plugins.lora_trigger, "embedding": Path(config.plugins.embedding).stem}
    native = [world.caption(i, None, config.language) for i in concepts]
    english = [words.get(name or "", "")] * len(native)
    return Trial(name or "none", name or "none", native, english, [*concepts])


def _settings(name: str, files: PluginFilesConfig, route: Route, base: str) -> tuple[str, dict[str, Any]]:
    """A plug-in's file and how it is attached.

    A whole checkpoint would take the place of what a UNet learned; there it is attached as a difference to
    the backbone.
    """
    strengths = {"lora": files.lora_strength, "controlnet": files.controlnet_strength}
    settings: dict[str, Any] = {"strength": strengths[name]} if name in strengths else {}
    if name == "checkpoint" and route.slot == "text":
        settings["base"] = base
    return getattr(files, name), settings
