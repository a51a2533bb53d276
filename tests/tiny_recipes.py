"""Denoising recipes of every kind on tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import make_text_encoder, make_unet, make_vae

from bdm.data.source import Source
from bdm.emoji.world import EmojiSource, World
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.text.vocabulary import clip_tokenizer
from bdm.training.recipes.backbone import backbone_recipe
from bdm.training.recipes.branch import branch_recipe
from bdm.training.recipes.checkpoint import checkpoint_recipe
from bdm.training.recipes.controlnet import controlnet_recipe
from bdm.training.recipes.denoising import DenoisingRecipe
from bdm.training.recipes.embedding import embedding_recipe
from bdm.training.recipes.lcm_lora import lcm_lora_recipe
from bdm.training.recipes.lora import lora_recipe
from bdm.training.recipes.native_text import native_text_recipe

#: Of plug-ins of the English community, with what tiny models need.
COMMUNITY = {
    "checkpoint": (checkpoint_recipe, {}),
    "lora": (lora_recipe, {"trigger": "ink"}),
    "lcm_lora": (lcm_lora_recipe, {}),
    "embedding": (embedding_recipe, {"trigger": "duskmood"}),
    "controlnet": (controlnet_recipe, {"widths": (8, 16, 16, 32)}),
}
KINDS = ("branch", "native_text", "backbone", *COMMUNITY)


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
    if kind == "native_text":
        own = {"connector": {"hidden": 8}, "train": ("text_encoder", "connector", "unet")}
        return native_text_recipe(source or make_source(), *folders, **own | options).eval()
    source = source or make_source("en")
    if kind == "backbone":
        parts = f"{folders[0]}/vae", f"{folders[0]}/text_encoder"
        return backbone_recipe(source, *parts, small_unet(), **options).eval()
    make, own = COMMUNITY[kind]
    return make(source, folders[0], **own | options).eval()


def write_stock(folder: Path) -> Path:
    """A tiny latent diffusion model."""
    stock = StableDiffusionPipeline(
        make_vae(), make_text_encoder(), clip_tokenizer(), make_unet(), DDIMScheduler(**SD15_SCHEDULE), None,
        None, requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(folder)
    return folder


def write_vocabulary(folder: Path, texts: Sequence[str]) -> Path:
    """A tokenizer of single characters, with T5's markers: one ``</s>`` behind a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = sorted({character for text in texts for character in text})
    known = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *characters])}
    cut = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    cut.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    cut.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cut, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def fresh(folder: Path, **model: int) -> dict:
    """Arguments of a tiny native text encoder with a vocabulary of its own."""
    source = make_source()
    vocabulary = write_vocabulary(folder, [source.caption(i) for i in range(len(source))])
    sizes = dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return {"vocabulary": str(vocabulary), "chunk_length": 12, "model": sizes | model}
