"""Defaults that are written twice, in a configuration and where it is used, are the same."""

from __future__ import annotations

import argparse
import inspect
from typing import get_args

import torch

from bdm import config
from bdm.cli.train import _plan_options
from bdm.config import data, evaluation, recipe, run
from bdm.data.batch import stream
from bdm.data.buckets import bucket_sizes
from bdm.data.pictures import PictureRules
from bdm.emoji.world import World
from bdm.models.caption_score import CaptionScorer
from bdm.plan.plan import Machine
from bdm.prepare.shard import ShardSettings
from bdm.speed.approximate import Approximation
from bdm.training.optimizers import make_optimizer
from bdm.training.recipes.build import RECIPES, SOURCES, recipe_maker, source_maker
from bdm.training.recipes.denoising import DenoisingRecipe
from bdm.training.states import save_state

#: A configuration, and what its settings are arguments of.
PAIRS = [
    (data.WorldConfig, [World]),
    (data.BucketsConfig, [bucket_sizes]),
    (run.OptimizerConfig, [make_optimizer]),
    (run.RunConfig, [stream, save_state]),
    (run.PrepareConfig, [ShardSettings, CaptionScorer]),
    (evaluation.ModeConfig, [Approximation]),
]
#: Kinds of data that are cut out of pictures.
PICTURES = ("folder", "shards", "parquet")


def by_kind(union) -> dict:
    """Kind -> configuration."""
    found = {}
    for member in get_args(union):
        found |= (
            {member.model_fields["kind"].annotation.__args__[0]: member}
            if hasattr(member, "model_fields")
            else by_kind(member)
        )
    return found


SOURCE_CONFIGS = by_kind(get_args(config.DataConfig)[0])
RECIPE_CONFIGS = by_kind(get_args(config.RecipeConfig)[0])
PAIRS += [
    (cls, [source_maker(kind), *([PictureRules] if kind in PICTURES else [])])
    for kind, cls in SOURCE_CONFIGS.items()
]
PAIRS += [
    (cls, [recipe_maker(kind), *([DenoisingRecipe] if issubclass(cls, recipe.DenoisingConfig) else [])])
    for kind, cls in RECIPE_CONFIGS.items()
]


def plain(value):
    """As a configuration writes it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return tuple(value) if isinstance(value, list) else value


def written_twice(cls, makers):
    """(setting, default of the configuration, default of what it is an argument of)."""
    for name, field in cls.model_fields.items():
        if field.is_required():
            continue
        own = field.get_default(call_default_factory=True)
        for maker in makers:
            parameter = inspect.signature(maker).parameters.get(name)
            if parameter is None or parameter.default is parameter.empty:
                continue
            if maker is PictureRules and own is None:
                continue  # stands for the source's own default (see ``PictureRules.of``)
            yield f"{cls.__name__}.{name}", plain(own), plain(parameter.default)


def test_every_kind_has_what_builds_it():
    assert SOURCE_CONFIGS.keys() == SOURCES.keys()
    assert RECIPE_CONFIGS.keys() == RECIPES.keys()


def test_defaults_of_configurations_are_those_of_what_they_configure():
    pairs = [pair for cls, makers in PAIRS for pair in written_twice(cls, makers)]
    assert len(pairs) > 80
    assert [pair for pair in pairs if pair[1] != pair[2]] == []


def test_defaults_of_a_planned_machine_are_those_of_the_command():
    parser = argparse.ArgumentParser()
    _plan_options(parser)
    options = parser.parse_args([])
    given = (
        options.gpus, options.gpu_memory, options.gpu_tflops, options.utilisation, options.price_per_hour
    )  # fmt: skip
    assert Machine(*given) == Machine()
