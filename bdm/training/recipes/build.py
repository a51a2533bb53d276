"""Configurations -> sources and recipes; the only place that reads both."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from ...config import DataConfig, PicturesConfig, RecipeConfig, RunConfig
from ...data.buckets import bucket_sizes
from ...data.source import Source
from ...errors import UserError
from .base import Recipe


def build_source(config: DataConfig) -> Source:
    """The data source that a configuration names."""
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, PicturesConfig):
        arguments["buckets"] = build_buckets(config)
    match config.kind:
        case "emoji":
            from ...emoji.world import EmojiSource, World

            return EmojiSource(World(**arguments.pop("world")), **arguments)
        case "shards":
            from ...data.shards import ShardSource as Built
        case "parquet":
            from ...data.parquet import ParquetSource as Built
        case "folder":
            from ...data.folder import FolderSource as Built
        case "prepared":
            from ...data.prepared import PreparedSource as Built
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
        ready: arguments of the recipe that take the place of the configuration's, such as models that need
            not be loaded.

    Raises:
        UserError: an unknown argument of a model, no examples, or see the recipe.
    """
    check_model_arguments(run.recipe)
    if source is None:
        source = build_source(run.data)
        _refuse_empty(source, validated=run.recipe.kind != "judge")
    arguments = run.recipe.model_dump(exclude={"kind"}) | ready
    match run.recipe.kind:
        case "autoencoder":
            from .autoencoder import AutoencoderRecipe as Built
        case "contrastive":
            from .contrastive import ContrastiveRecipe as Built
        case "backbone":
            from .backbone import backbone_recipe as Built
        case "branch":
            from .branch import branch_recipe as Built
        case "checkpoint":
            from .checkpoint import checkpoint_recipe as Built
        case "lora":
            from .lora import lora_recipe as Built
        case "lcm_lora":
            from .lcm_lora import lcm_lora_recipe as Built
        case "embedding":
            from .embedding import embedding_recipe as Built
        case "controlnet":
            from .controlnet import controlnet_recipe as Built
        case "judge":
            from .judge import JudgeRecipe as Built
    # The configuration's own check has paired recipe and data.
    return Built(source, **arguments, seed=run.seed)  # pyright: ignore[reportArgumentType]


def check_model_arguments(config: RecipeConfig) -> None:
    """Refuse arguments that a recipe's model does not have.

    Transformers' configurations would keep them without a word.

    Raises:
        UserError: names the argument and what is most like it.
    """
    for key, constructor in _constructors(config).items():
        allowed = [name for name in inspect.signature(constructor).parameters if name != "self"]
        if unknown := [name for name in getattr(config, key) or {} if name not in allowed]:
            alike = get_close_matches(unknown[0], allowed, n=3, cutoff=0.0)
            raise UserError(
                f"recipe.{key}.{unknown[0]}: {constructor.__name__} has no such argument; the nearest are"
                f" {', '.join(alike)}: correct or remove it"
            )


def _constructors(config: RecipeConfig) -> dict[str, Any]:
    """What the arguments that a recipe passes on are arguments of, by the recipe's key."""
    match config.kind:
        case "autoencoder":
            from diffusers import AutoencoderKL

            return {"model": AutoencoderKL}
        case "backbone":
            from diffusers import UNet2DConditionModel

            return {"unet": UNet2DConditionModel}
        case "contrastive":
            if config.architecture == "clip":
                from transformers import CLIPTextConfig as Text
                from transformers import CLIPVisionConfig as Vision
            else:
                from transformers import ChineseCLIPTextConfig as Text
                from transformers import ChineseCLIPVisionConfig as Vision
            return {"text": Text, "vision": Vision}
    return {}


def _refuse_empty(source: Source, validated: bool) -> None:
    if not len(source):
        raise UserError(
            "the data hold no examples; take more of them (data.limit, data.groups, data.held_out, filters)"
        )
    if validated and not len(source.validation):
        raise UserError(
            "the data hold no validation examples (in the emoji world: none of the chosen concepts has a"
            " held-out pair); take more of them (data.limit, data.groups, data.colours)"
        )
