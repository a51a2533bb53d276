"""Configurations -> sources and recipes; the only place that reads both."""

from __future__ import annotations

from typing import Any

from ..config import DataConfig, PicturesConfig, RunConfig
from ..data.buckets import bucket_sizes
from ..data.source import Source
from .base import Recipe


def build_source(config: DataConfig) -> Source:
    """The data source that a configuration names."""
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, PicturesConfig):
        arguments["buckets"] = build_buckets(config)
    match config.kind:
        case "emoji":
            from ..data.emoji import EmojiSource, World

            return EmojiSource(World(**arguments.pop("world")), **arguments)
        case "shards":
            from ..data.shards import ShardSource as Built
        case "parquet":
            from ..data.parquet import ParquetSource as Built
        case "folder":
            from ..data.folder import FolderSource as Built
        case "prepared":
            from ..data.prepared import PreparedSource as Built
    return Built(**arguments)


def build_buckets(config: DataConfig) -> tuple[tuple[int, int], ...]:
    """The (width, height) of the buckets that a configuration asks for; none for squares."""
    buckets = getattr(config, "buckets", None)
    return bucket_sizes(config.size, buckets.step, buckets.max_aspect) if buckets else ()  # pyright: ignore


def build_recipe(run: RunConfig, source: Source | None = None, **ready: Any) -> Recipe:
    """The recipe that a configuration names, on its data.

    Args:
        run: the configuration.
        source: used in place of the data that the configuration names.
        ready: arguments of the recipe that take the place of the configuration's, such as models that need not be loaded.
    """
    source = source or build_source(run.data)
    arguments = run.recipe.model_dump(exclude={"kind"}) | ready
    match run.recipe.kind:
        case "autoencoder":
            from .autoencoder import AutoencoderRecipe as Built
        case "contrastive":
            from .contrastive import ContrastiveRecipe as Built
        case "backbone":
            from .backbone import BackboneRecipe as Built
        case "branch":
            from .branch import BranchRecipe as Built
        case "checkpoint":
            from .community import CheckpointRecipe as Built
        case "lora":
            from .community import LoraRecipe as Built
        case "embedding":
            from .community import EmbeddingRecipe as Built
        case "controlnet":
            from .community import ControlNetRecipe as Built
        case "judge":
            from .judge import JudgeRecipe as Built
    # The configuration's own check has paired recipe and data.
    return Built(source, **arguments, seed=run.seed)  # pyright: ignore[reportArgumentType]
