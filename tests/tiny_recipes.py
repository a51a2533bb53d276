"""Denoising recipes of every kind on tiny models."""

from __future__ import annotations

from tiny import make_unet

from bdm.data.source import Source
from bdm.emoji.world import EmojiSource, World
from bdm.training.recipes.backbone import backbone_recipe
from bdm.training.recipes.branch import branch_recipe
from bdm.training.recipes.checkpoint import checkpoint_recipe
from bdm.training.recipes.controlnet import controlnet_recipe
from bdm.training.recipes.denoising import DenoisingRecipe
from bdm.training.recipes.embedding import embedding_recipe
from bdm.training.recipes.lcm_lora import lcm_lora_recipe
from bdm.training.recipes.lora import lora_recipe

#: Of plug-ins of the English community, with what tiny models need.
COMMUNITY = {
    "checkpoint": (checkpoint_recipe, {}),
    "lora": (lora_recipe, {"trigger": "ink"}),
    "lcm_lora": (lcm_lora_recipe, {}),
    "embedding": (embedding_recipe, {"trigger": "duskmood"}),
    "controlnet": (controlnet_recipe, {"widths": (8, 16, 16, 32)}),
}
KINDS = ("branch", "backbone", *COMMUNITY)


def make_source(language: str = "zh", **options) -> EmojiSource:
    return EmojiSource(World(), language=language, size=64, **{"limit": 4, **options})


def small_unet() -> dict:
    """Arguments of a UNet that fits the tiny text encoder."""
    names = ("sample_size", "block_out_channels", "cross_attention_dim", "norm_num_groups")
    return {name: make_unet().config[name] for name in names}


def make_recipe(
    kind: str, folders: tuple[str, str], source: Source | None = None, **options
) -> DenoisingRecipe:
    """In evaluation mode; ``folders`` are those of the backbone and the native text encoder."""
    if kind == "branch":
        return branch_recipe(source or make_source(), *folders, **options).eval()
    source = source or make_source("en")
    if kind == "backbone":
        parts = f"{folders[0]}/vae", f"{folders[0]}/text_encoder"
        return backbone_recipe(source, *parts, small_unet(), **options).eval()
    make, own = COMMUNITY[kind]
    return make(source, folders[0], **own | options).eval()
