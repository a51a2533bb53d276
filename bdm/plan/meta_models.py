"""Models without their weights.

From the configurations in a folder, the shapes in a file, or what is known of a hub's model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..formats.checkpoint import PREFIXES, Parts, empty_part, read_parts
from ..formats.weights import is_weight_file, read_json, read_weights, resolve_folder
from ..models.backbone import Backbone, check_backbone
from ..models.samplers import make_scheduler
from ..text.connector import Connector, read_connector_config
from ..text.encoders import (
    build_text_model,
    cn_clip_config,
    cn_clip_tower,
    load_tokenizer,
    read_encoder_config,
)
from ..text.native import SETTINGS_FILE, NativeTextEncoder, NativeTextSettings
from ..text.packaged import find_packaged, named_package
from ..text.vocabulary import chinese_clip_tokenizer, clip_tokenizer

#: SD1.5's configurations, where its classes have other defaults (the config.json files of its repository).
SD15: dict[str, dict[str, Any]] = {
    "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
        "projection_dim": 768,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
}

#: Hub names of SD1.5; its first home is gone and still stands in many configurations.
SD15_NAMES = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")

#: Width and layers of Chinese CLIP's text encoders by hub name (RoBERTa-wwm large and base, RBT3: arXiv
#: 2211.01335, table 1).
CHINESE_CLIPS = {
    "OFA-Sys/chinese-clip-vit-huge-patch14": (1024, 24),
    "OFA-Sys/chinese-clip-vit-large-patch14-336px": (768, 12),
    "OFA-Sys/chinese-clip-vit-large-patch14": (768, 12),
    "OFA-Sys/chinese-clip-vit-base-patch16": (768, 12),
    "OFA-Sys/chinese-clip-rn50": (768, 3),
}


def make_meta_backbone(source: str) -> Backbone:
    """An SD1.5 model from a file, a folder or a hub name; none of its values is read."""
    path = Path(source)
    if path.is_file():
        parts = read_parts(path, header_only=True)
    elif source in SD15_NAMES and not path.is_dir():
        parts = Parts({}, SD15)
    else:
        folder = _configurations(source)
        parts = Parts({}, {name: read_json(folder / name / "config.json") for name in PREFIXES})
    built = {name: _part(name, parts, source) for name in PREFIXES}
    check_backbone(built["unet"])
    return Backbone(tokenizer=clip_tokenizer(), scheduler=make_scheduler("DPM++ 2M"), **built)


def make_meta_native_text_encoder(source: str) -> NativeTextEncoder:
    """A native text encoder from a folder, a file of cn_clip, a pip package or a hub name.

    None of its values is read.
    """
    from transformers import ChineseCLIPTextConfig

    if is_weight_file(source):
        bert = cn_clip_tower(read_weights(source, header_only=True).tensors)
        return _native(cn_clip_config(bert, Path(source)), chinese_clip_tokenizer())
    if source in CHINESE_CLIPS and not Path(source).is_dir():
        width, layers = CHINESE_CLIPS[source]
        sizes: dict[str, Any] = dict(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        return _native(ChineseCLIPTextConfig(vocab_size=21128, **sizes), chinese_clip_tokenizer())
    package = find_packaged(source)
    if package is None:
        folder = _configurations(source)
        package = named_package(folder)
        if package is None:
            connector, saved = read_connector_config(folder), folder / SETTINGS_FILE
            settings = NativeTextSettings.read(saved) if saved.is_file() else None
            return _native(read_encoder_config(folder), load_tokenizer(folder), settings, connector)
    packed = package.open()
    return _native(packed.config(), packed.tokenizer(), NativeTextSettings(**package.settings))


def make_meta_part(name: str, source: str) -> Any:
    """A VAE or an English text encoder from a folder or a hub name; none of its values is read."""
    config = read_json(_configurations(source) / "config.json")
    # A CLIP's folder keeps both encoders' configurations; the text part is taken.
    return _part(name, Parts({}, {name: config.get("text_config", config)}), source)


def _part(name: str, parts: Parts, source: str) -> Any:
    with torch.device("meta"):
        return empty_part(name, parts, source).eval().requires_grad_(False)


def _native(
    config: Any,
    tokenizer: Any,
    settings: NativeTextSettings | None = None,
    connector: dict[str, int] | None = None,
) -> NativeTextEncoder:
    with torch.device("meta"):
        joined = Connector(**connector) if connector else None
        return NativeTextEncoder(build_text_model(config), tokenizer, settings, joined)


def _configurations(source: str) -> Path:
    try:
        return resolve_folder(source, files=["*.json", "*.txt", "*.model"])
    except UserError as error:
        known = ", ".join((*SD15_NAMES, *CHINESE_CLIPS))
        raise UserError(
            f"{error} (a plan needs only its configuration; known without it are {known})"
        ) from None
