"""The frozen backbone: what Stable Diffusion 1.5 is, and how its pixels and latents relate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError
from ..files import atomic_write, cache_folder
from ..formats.checkpoint import PREFIXES, Parts, build_part, read_parts, read_vae
from ..formats.choice import FileChoice
from ..formats.load_options import Dtype, FileKeywords, LoadOptions, read_options
from ..formats.names import text_to_plain
from ..formats.noise import Noise, read_scheduler
from ..formats.weights import (
    ANY_FILES,
    read_json,
    read_tensors,
    read_weights_folder,
    refuse_not_finite,
    resolve_folder,
    weight_files,
)
from ..text.english import encode_english
from ..text.vocabulary import read_clip_tokenizer
from .samplers import make_scheduler
from .scheduled import restore


@dataclass
class Backbone:
    """The parts of a Stable Diffusion 1.5 model, in evaluation mode and without gradients."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel | Any
    tokenizer: CLIPTokenizer | Any
    unet: UNet2DConditionModel
    scheduler: Any


class BackboneKeywords(FileKeywords, total=False):
    """What ``load_backbone`` takes besides: parts that are there already; None leaves one out."""

    torch_dtype: Dtype
    unet: UNet2DConditionModel | None
    tokenizer: CLIPTokenizer | Any
    scheduler: Any


def load_backbone(
    source: str | Path,
    dtype: Dtype = torch.float32,
    vae: str | Path | AutoencoderKL | None = None,
    text_encoder: bool | CLIPTextModel = True,
    **options: Unpack[BackboneKeywords],
) -> Backbone:
    """Load an SD1.5 model; nothing goes online for a local file or folder.

    Args:
        source: a single file in the original layout (``.safetensors``, ``.ckpt``), a diffusers folder or a
            hub name.
        dtype: of the weights, or a mapping by part; None and "auto" keep the file's.
        vae: another VAE (file, folder or hub name), for files without one, or one that is there already.
        text_encoder: load the text encoder and its tokenizer; None takes their places otherwise (see
            ``empty_prompt_features``). Or one that is there already.
        options: ``unet``, ``tokenizer`` and ``scheduler`` instead of the source's; ``variant``,
            ``use_safetensors``, ``device_map`` ... as in diffusers (see ``FileKeywords``).

    Returns:
        The parts; CLIP's vocabulary comes from a pip package where the source has none, the scheduler is
        DPM++ 2M there, for what the source says of its noise (see ``bdm.formats.signs``).

    Raises:
        UserError: missing or damaged files, a model that is not SD1.5's, or an option that is not known or
            not done here.
    """
    rest: dict[str, Any] = dict(options)
    given = {name: rest.pop(name) for name in ("unet", "tokenizer", "scheduler") if name in rest}
    if vae is not None:
        given["vae"] = vae
    if not isinstance(text_encoder, bool):
        given["text_encoder"] = text_encoder
    elif not text_encoder:
        given |= {"text_encoder": None, "tokenizer": None} | given
    rest["dtype"] = _one_dtype(dtype, rest.pop("torch_dtype", None))
    loading = read_options(rest, "load_backbone", torch.float32, tuple(PREFIXES))
    path = find_backbone(source, loading.hub)
    if path.is_file():
        loading.files.check_file(path)
    else:
        files = loading.files.among([path / name for name in PREFIXES], path)
        loading = dataclasses.replace(loading, files=files)
    return build_backbone(path, given, loading)


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    if torch_dtype is None:
        return "auto" if dtype is None else dtype
    if dtype not in (torch.float32, torch_dtype):  # the first is what stands there if nothing was given
        raise UserError(f"load_backbone: dtype is {dtype} and torch_dtype {torch_dtype}; give one of them")
    return torch_dtype


def find_backbone(source: str | Path, hub: Mapping[str, Any] | None = None) -> Path:
    """The file or folder of an SD1.5 model.

    Raises:
        UserError: neither a local one nor a name that the hub gives.
    """
    path = Path(source)
    return path if os.path.isfile(path) else resolve_folder(source, hub=hub)


def build_backbone(path: Path, given: Mapping[str, Any], loading: LoadOptions) -> Backbone:
    """The parts of the model in a file or folder.

    Args:
        path: where it lies.
        given: parts that are there already, None for those to leave out; a VAE may also be a path.
        loading: how the others are loaded.

    Raises:
        UserError: see ``load_backbone``.
    """
    built = dict(given)
    if isinstance(vae := given.get("vae"), str | Path):
        other = find_backbone(vae, loading.elsewhere())
        built["vae"] = _placed("vae", read_vae(other, loading.files), other, loading)
    wanted = [name for name in PREFIXES if name not in built]
    parts = read_parts(path, header_only=not wanted, names=wanted, files=loading.files)
    built |= {name: _placed(name, parts, path, loading) for name in wanted}
    if built["unet"] is not None:
        check_backbone(built["unet"])
    if "tokenizer" not in built:
        built["tokenizer"] = _tokenizer(path, built["text_encoder"])
    if "scheduler" not in built:
        built["scheduler"] = _scheduler(path, parts.noise)
    return Backbone(**built)


def _placed(name: str, parts: Parts, path: Path, loading: LoadOptions) -> Any:
    return build_part(name, parts, path, loading.dtype_of(name)).to(loading.device)


def _scheduler(path: Path, noise: Noise) -> Any:
    read = read_scheduler(path)
    return make_scheduler("DPM++ 2M", noise=noise) if read is None else restore(read)


def _tokenizer(path: Path, text_encoder: Any) -> CLIPTokenizer:
    """A model's tokenizer, which must be its text encoder's where that is there."""
    folder = path / "tokenizer"
    if text_encoder is None:
        return read_clip_tokenizer(folder)
    rows = text_encoder.get_input_embeddings().weight.shape[0]
    return read_clip_tokenizer(folder, rows, text_encoder.config.max_position_embeddings)


@torch.no_grad()
def empty_prompt_features(
    source: str | Path, dtype: torch.dtype | None = torch.float32, files: FileChoice = ANY_FILES
) -> Tensor:
    """What a model's text encoder says of "", the only English prompt that most pictures have.

    It is worked out once and kept in the user's cache folder (``XDG_CACHE_HOME/bdm``), by the place, size and
    time of the weights, so that the text encoder need not be loaded.

    Args:
        source: see ``load_backbone``.
        dtype: of the text encoder's weights, and so of the features; None keeps the file's.
        files: which of a folder's files.

    Returns:
        (1, 77, D).
    """
    path = find_backbone(source)
    read = [path] if path.is_file() else weight_files(path / "text_encoder", files)
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in read]
    key = hashlib.sha256(json.dumps([facts, str(dtype)]).encode()).hexdigest()[:32]
    kept = cache_folder() / f"empty-{key}.safetensors"
    with suppress(OSError, UserError, KeyError):
        if kept.is_file():
            return read_tensors(kept)["features"]
    parts = read_parts(path, names=("text_encoder",), files=files)
    text_encoder = build_part("text_encoder", parts, path, dtype)
    features = encode_english([""], text_encoder, _tokenizer(path, text_encoder))
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept, shared=True) as partial:
            save_file({"features": features.contiguous()}, partial)
    return features


def load_vae(source: str | Path) -> AutoencoderKL:
    """A VAE alone, in float32: from a file, a folder (its own or a whole model's) or a hub name.

    Raises:
        UserError: nothing is there, it holds no VAE, or it is damaged.
    """
    path = Path(source)
    path = path if os.path.exists(path) else resolve_folder(source)
    return build_part("vae", read_vae(path), path, torch.float32)


def load_clip_text(source: str | Path) -> CLIPTextModel:
    """The text part of a CLIP, in float32.

    From the folder of a text encoder or of a whole CLIP, or a hub name.

    Raises:
        UserError: nothing is there, it holds no text encoder of CLIP, or it is damaged.
    """
    folder = resolve_folder(source)
    config = read_json(folder / "config.json")
    weights = text_to_plain(read_weights_folder(folder))
    refuse_not_finite(weights, folder)
    # A whole CLIP's folder keeps both encoders' configurations.
    parts = Parts(
        {"text_encoder": weights} if weights else {}, {"text_encoder": config.get("text_config", config)}
    )
    return build_part("text_encoder", parts, folder, torch.float32)


def check_backbone(unet: UNet2DConditionModel) -> None:
    """Refuse UNets that a branch cannot bridge, by their name.

    Raises:
        UserError: SDXL, SD2, an inpainting or another modified UNet.
    """
    config = unet.config
    if config.get("addition_embed_type") == "text_time":
        kind = f"SDXL (addition_embed_type 'text_time', cross_attention_dim {config['cross_attention_dim']})"
    elif config.get("use_linear_projection"):
        kind = f"SD2 (use_linear_projection, cross_attention_dim {config['cross_attention_dim']})"
    elif config["in_channels"] == 9:
        kind = "an inpainting UNet (9 input channels)"
    elif config["in_channels"] != 4 or any(
        config.get(key)
        for key in ("class_embed_type", "encoder_hid_dim", "addition_embed_type", "time_cond_proj_dim")
    ):
        kind = f"a modified UNet ({config['in_channels']} input channels)"
    else:
        return
    raise UserError(f"the backbone is {kind}; a branch needs an SD1.5 UNet: use an SD1.5 checkpoint")


def encode_moments(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w) mean and log variance of the posterior (unscaled)."""
    return vae.encode(pictures).latent_dist.parameters  # pyright: ignore[reportAttributeAccessIssue]


def sample_latents(vae: AutoencoderKL, moments: Tensor, noise: Tensor) -> Tensor:
    """A fresh draw of scaled latents from posterior moments: (mean + std * noise) * scaling_factor."""
    mean, log_variance = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return (mean + std * noise) * vae.config["scaling_factor"]


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
    return vae.decode((latents / vae.config["scaling_factor"]).to(vae.dtype)).sample  # pyright: ignore[reportAttributeAccessIssue]
