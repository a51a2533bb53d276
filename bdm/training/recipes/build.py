"""Configurations -> sources and recipes; the only place that reads both."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...config import (
    DataConfig,
    FreshEncoderConfig,
    MixConfig,
    ParquetConfig,
    PicturesConfig,
    PreparedConfig,
    RecipeConfig,
    RunConfig,
    ShardsConfig,
)
from ...data.buckets import bucket_sizes
from ...data.source import Source
from ...errors import UserError
from .base import Recipe

if TYPE_CHECKING:
    from ...data.indexing import Corpus

#: What each kind of data is built with, by module and name: imported when asked for, for each has libraries
#: of its own.
SOURCES = {
    "emoji": ("emoji.world", "EmojiSource"),
    "shards": ("data.shards", "ShardSource"),
    "parquet": ("data.parquet", "ParquetSource"),
    "folder": ("data.folder", "FolderSource"),
    "prepared": ("data.prepared", "PreparedSource"),
    "mix": ("data.mixing", "MixedSource"),
    "module": ("training.recipes.module", "module_source"),
}

#: The same of each kind of recipe.
RECIPES = {
    "autoencoder": ("autoencoder", "AutoencoderRecipe"),
    "contrastive": ("contrastive", "ContrastiveRecipe"),
    "backbone": ("backbone", "backbone_recipe"),
    "branch": ("branch", "branch_recipe"),
    "native_text": ("native_text", "native_text_recipe"),
    "align": ("align", "align_recipe"),
    "checkpoint": ("checkpoint", "checkpoint_recipe"),
    "lora": ("lora", "lora_recipe"),
    "lcm_lora": ("lcm_lora", "lcm_lora_recipe"),
    "embedding": ("embedding", "embedding_recipe"),
    "controlnet": ("controlnet", "controlnet_recipe"),
    "judge": ("judge", "JudgeRecipe"),
    "module": ("module", "module_recipe"),
}


def source_maker(kind: str) -> Any:
    """What builds the data of a kind."""
    module, name = SOURCES[kind]
    return getattr(import_module(f"...{module}", __package__), name)


def recipe_maker(kind: str) -> Any:
    """What builds the recipe of a kind."""
    module, name = RECIPES[kind]
    return getattr(import_module(f".{module}", __package__), name)


def build_source(config: DataConfig) -> Source:
    """The data source that a configuration names."""
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, ShardsConfig | ParquetConfig):
        return _sharded_source(config)
    if isinstance(config, MixConfig):
        sources = [build_source(part.data) for part in config.parts]
        return source_maker(config.kind)(sources, [part.weight for part in config.parts])
    if isinstance(config, PreparedConfig):
        return _prepared_source(config)
    if isinstance(config, PicturesConfig):
        arguments["buckets"] = build_buckets(config)
    if config.kind == "emoji":
        from ...emoji.world import World

        arguments["world"] = World(**arguments["world"])
    return source_maker(config.kind)(**arguments)


def _prepared_source(config: PreparedConfig) -> Source:
    """Prepared shards, in partitions if asked."""
    source = source_maker(config.kind)(config.path, config.min_score, config.duplicates)
    if config.partitions is None:
        return source
    from ...data.partitioned import PartitionedPrepared

    return PartitionedPrepared(source, config.partitions, config.local, config.local_gb)


def _sharded_source(config: ShardsConfig | ParquetConfig) -> Source:
    """Shards through their index, or each with its own."""
    indexed = ("index", "partitions", "local", "local_gb")
    arguments: dict[str, Any] = config.model_dump(exclude={"kind"})
    arguments["buckets"] = build_buckets(config)
    if config.index is None:
        return source_maker(config.kind)(**{k: v for k, v in arguments.items() if k not in indexed})
    from ...data.indexed import IndexedSource

    arguments.pop("cache")
    return IndexedSource(kind=config.kind, **arguments)


def build_corpus(config: ShardsConfig | ParquetConfig) -> Corpus:
    """What ``bdm index`` makes an index of."""
    from ...data.indexing import Corpus
    from ...data.pictures import PictureRules

    names = PicturesConfig.model_fields.keys() | {"captions"}
    rules: dict[str, Any] = config.model_dump(include=set(names))
    rules["buckets"] = build_buckets(config)
    default = {} if config.kind == "shards" else {"captions": {"text": 1.0}}
    patterns = (config.urls,) if isinstance(config.urls, str) else config.urls
    picture = {"picture": config.picture} if isinstance(config, ParquetConfig) else {}
    return Corpus(kind=config.kind, urls=patterns, rules=PictureRules.of(default, rules), **picture)


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
    return recipe_maker(run.recipe.kind)(source, **arguments, seed=run.seed)


def check_model_arguments(config: RecipeConfig) -> None:
    """Refuse arguments that a recipe's model does not have.

    Transformers' configurations would keep them without a word.

    Raises:
        UserError: names the argument and what is most like it.
    """
    for key, constructor in _constructors(config).items():
        allowed = [name for name in inspect.signature(constructor).parameters if name != "self"]
        given: Any = config
        for name in key.split("."):
            given = getattr(given, name)
        if unknown := [name for name in given or {} if name not in allowed]:
            alike = get_close_matches(unknown[0], allowed, n=3, cutoff=0.0)
            raise UserError(
                f"recipe.{key}.{unknown[0]}: {constructor.__name__} has no such argument; the nearest are"
                f" {', '.join(alike)}: correct or remove it"
            )


def _constructors(config: RecipeConfig) -> dict[str, Any]:
    """What the arguments that a recipe passes on are arguments of, by the recipe's key."""
    found: dict[str, Any] = {}
    if isinstance(getattr(config, "native_text_encoder", None), FreshEncoderConfig):
        from transformers import CLIPTextConfig

        found["native_text_encoder.model"] = CLIPTextConfig
    match config.kind:
        case "autoencoder":
            from diffusers import AutoencoderKL

            return {"model": AutoencoderKL}
        case "backbone":
            from diffusers import UNet2DConditionModel

            return found | {"unet": UNet2DConditionModel}
        case "contrastive":
            if config.architecture == "clip":
                from transformers import CLIPTextConfig as Text
                from transformers import CLIPVisionConfig as Vision
            else:
                from transformers import ChineseCLIPTextConfig as Text
                from transformers import ChineseCLIPVisionConfig as Vision
            return {"text": Text, "vision": Vision}
    return found


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
