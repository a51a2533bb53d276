"""Whole SD1.5 models: single files in the original layout and diffusers folders, read into parts without any network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..weights import WeightFile, read_json, read_weights, read_weights_folder, refuse_not_finite
from .identify import identify_source, require
from .names import (
    UNetBuild,
    controlnet_to_diffusers,
    text_to_plain,
    text_to_prefixed,
    unet_to_diffusers,
    unet_to_original,
    vae_to_diffusers,
    vae_to_original,
)

#: Prefixes of the parts in an original-layout file.
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
#: Key of the safetensors header under which the parts' configurations are kept; the original layout has no place for them.
CONFIG_KEY = "bdm.config"

#: Settings that SD1.5 does not share with the defaults of its classes and that no weight tells.
_UNET = {"attention_head_dim": 8, "sample_size": 64}
_VAE = {"sample_size": 512, "scaling_factor": 0.18215}
_TEXT = {
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, "projection_dim": 768,
}  # fmt: skip


#: What reading a configuration off damaged weights, or building a network from a damaged one, raises.
_BUILD_ERRORS = (KeyError, IndexError, StopIteration, ValueError, TypeError, ZeroDivisionError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Parts:
    """The weights of a model by part ("unet", "vae", "text_encoder"), under diffusers' names.

    Attributes:
        weights: by part; a part that the file does not hold is missing.
        configs: the parts' configurations where the source keeps them.
    """

    weights: dict[str, dict[str, Tensor]]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_parts(source: Path, header_only: bool = False) -> Parts:
    """Read a checkpoint: a single file in the original layout, or a diffusers folder.

    EMA weights are used where a file holds nothing else.

    Args:
        source: file or folder.
        header_only: of a file read names and shapes, but no values (see ``read_weights``).

    Raises:
        UserError: not an SD1.5 checkpoint, damaged, or NaN.
    """
    require(identify_source(source), ("checkpoint",), source)
    if source.is_dir():
        parts = {name: read_weights_folder(source / name) for name in PREFIXES if (source / name / "config.json").is_file()}
        configs = {name: read_json(source / name / "config.json") for name in parts}
    else:
        file = read_weights(source, header_only)
        parts = {name: _part(file.tensors, prefix) for name, prefix in PREFIXES.items()}
        if not parts["unet"]:
            parts["unet"] = _averaged_unet(file)
        configs = _kept_configs(file)
    convert = {"unet": unet_to_diffusers, "vae": vae_to_diffusers, "text_encoder": text_to_plain}
    weights = {name: convert[name](tensors) for name, tensors in parts.items() if tensors}
    if "unet" not in weights:
        raise UserError(f"{source} holds no unet; it is no complete checkpoint: get it again")
    for name, tensors in weights.items():
        if not header_only:
            refuse_not_finite(tensors, f"{source} ({name})")
    return Parts(weights, configs)


def write_checkpoint(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of an original-layout file for parts under diffusers' names."""
    convert = {"unet": unet_to_original, "vae": vae_to_original, "text_encoder": text_to_prefixed}
    tensors = {}
    for name, prefix in PREFIXES.items():
        if name in weights:
            inner = "transformer." if name == "text_encoder" else ""
            tensors |= {f"{prefix}{inner}{key}": tensor for key, tensor in convert[name](weights[name]).items()}
    return tensors


def unet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``UNet2DConditionModel`` (or ControlNet, or branch), read off its shapes."""
    build = UNetBuild.of(weights)
    down = tuple("CrossAttnDownBlock2D" if i in build.attention else "DownBlock2D" for i in range(build.levels))
    up = tuple("CrossAttnUpBlock2D" if build.levels - 1 - i in build.attention else "UpBlock2D" for i in range(build.levels))
    widths = tuple(weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(build.levels))
    text = next(tensor.shape[1] for key, tensor in weights.items() if key.endswith("attn2.to_k.weight"))
    return {
        "block_out_channels": widths, "layers_per_block": build.layers, "down_block_types": down, "up_block_types": up,
        "cross_attention_dim": text, "in_channels": weights["conv_in.weight"].shape[1], **_UNET,
    }  # fmt: skip


def vae_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``AutoencoderKL``, read off its shapes."""
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down_blocks."))
    layers = 1 + max(int(key.split(".")[4]) for key in weights if key.startswith("encoder.down_blocks.0.resnets."))
    widths = tuple(weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    return {
        "block_out_channels": widths, "layers_per_block": layers, "latent_channels": weights["quant_conv.weight"].shape[0] // 2,
        "down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels, **_VAE,
    }  # fmt: skip


def text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of a CLIP text encoder, read off its shapes; heads are 64 wide, as in every CLIP."""
    width = weights["embeddings.token_embedding.weight"].shape[1]
    layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layers."))
    inner = weights["encoder.layers.0.mlp.fc1.weight"].shape[0]
    heads = max(1, width // 64)
    return _TEXT | {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}


def build_part(name: str, parts: Parts, source: Path, dtype: torch.dtype | None) -> Any:
    """A model with a part's weights in place, without a second copy of them.

    Args:
        name: "unet", "vae" or "text_encoder".
        parts: from ``read_parts``.
        source: for messages.
        dtype: of the weights; None keeps the file's.

    Raises:
        UserError: the part is missing, incomplete or of other shapes.
    """
    if name not in parts.weights:
        raise UserError(f"{source} holds no {name.replace('_', ' ')}; give one beside it, or a complete checkpoint")
    model = empty_part(name, parts, source)
    assign_weights(model, parts.weights[name], f"{source} ({name})", dtype)
    return model.eval().requires_grad_(False)


def empty_part(name: str, parts: Parts, source: object) -> Any:
    """The model of a part without its weights, which are on the meta device (see ``build_part``)."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    infer = {"unet": unet_config, "vae": vae_config, "text_encoder": text_config}[name]
    try:
        config = parts.configs.get(name) or infer(parts.weights[name])
        with init_empty_weights():
            if name == "unet":
                return UNet2DConditionModel.from_config(config)
            if name == "vae":
                return AutoencoderKL.from_config(config)
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
    except _BUILD_ERRORS as error:
        raise UserError(f"{source}: its {name} is no SD1.5 network ({type(error).__name__}: {error}); get the file again") from None


def assign_weights(model: Any, weights: Mapping[str, Tensor], source: object, dtype: torch.dtype | None = None) -> None:
    """Make tensors a model's weights, all of them and in place of what it has.

    Raises:
        UserError: missing, superfluous or misshapen weights.
    """
    own = model.state_dict()
    weights = named_like(own, weights)
    check_names(own, weights, source)
    model.load_state_dict({key: t.to(dtype or t.dtype) for key, t in weights.items()}, strict=True, assign=True)


def check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that are not exactly those of a model.

    Args:
        own: the model's.
        given: what is to take their place.
        source: for messages.

    Raises:
        UserError: names some that are missing, superfluous or of another shape.
    """
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        what = "misses" if missing else "has the unknown"
        raise UserError(f"{source} {what} {len(missing or extra)} weights, such as {(missing or extra)[0]}; get the file again")
    for key, tensor in given.items():
        if tensor.shape != own[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(tensor.shape)}, this model's has {tuple(own[key].shape)}; "
                "the file is made for a network of another size"
            )


def named_like(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Text weights under the names of the installed transformers, which dropped ``text_model.`` with version 5.6."""
    return text_to_prefixed(weights) if any(key.startswith("text_model.") for key in own) else weights


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _averaged_unet(file: WeightFile) -> dict[str, Tensor]:
    """The UNet of a file that holds only its moving average, whose names have lost their dots."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    averaged = _part(file.tensors, "model_ema.diffusion_model")
    with init_empty_weights():
        unet: Any = UNet2DConditionModel.from_config(_kept_configs(file).get("unet") or {"cross_attention_dim": 768})
    names = {key.replace(".", ""): key for key in unet_to_original(unet.state_dict())}
    return {names.get(key, key): tensor for key, tensor in averaged.items()}


def _kept_configs(file: WeightFile) -> dict[str, dict[str, Any]]:
    try:
        kept = json.loads(file.metadata.get(CONFIG_KEY, "{}"))
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or not all(isinstance(config, dict) for config in kept.values()):
        raise UserError(f"{file.path}: the header's {CONFIG_KEY} is damaged; convert the file again")
    return kept


def load_controlnet(source: Path, dtype: torch.dtype | None = None) -> Any:
    """A ``ControlNetModel`` from a diffusers folder or a single file in either layout.

    Raises:
        UserError: not an SD1.5 ControlNet, damaged, or NaN.
    """
    from accelerate import init_empty_weights
    from diffusers import ControlNetModel

    require(identify_source(source), ("controlnet",), source)
    if source.is_dir():
        weights, config = read_weights_folder(source), read_json(source / "config.json")
        if config.get("global_pool_conditions"):
            raise UserError(f"{source} pools its conditions (global_pool_conditions, a shuffle ControlNet); such are not supported")
    else:
        file = read_weights(source)
        weights = controlnet_to_diffusers(_part(file.tensors, "control_model.") or file.tensors)
        config = _kept_configs(file).get("controlnet")
    refuse_not_finite(weights, source)
    try:
        with init_empty_weights():
            model: Any = ControlNetModel.from_config(config or controlnet_config(weights))
    except _BUILD_ERRORS as error:
        raise UserError(f"{source} is no SD1.5 ControlNet ({type(error).__name__}: {error}); get the file again") from None
    assign_weights(model, weights, source, dtype)
    return model.eval().requires_grad_(False)


def controlnet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``ControlNetModel``, read off its shapes."""
    config = unet_config(weights)
    path = "controlnet_cond_embedding"
    # The path's widths: the first convolution, then every second block widens.
    blocks = sorted(int(key.split(".")[2]) for key in weights if key.startswith(f"{path}.blocks.") and key.endswith(".weight"))
    widths = [weights[f"{path}.conv_in.weight"].shape[0], *(weights[f"{path}.blocks.{i}.weight"].shape[0] for i in blocks[1::2])]
    kept = {key: config[key] for key in ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")}
    kept |= {"in_channels": config["in_channels"], "attention_head_dim": config["attention_head_dim"]}
    return kept | {"conditioning_embedding_out_channels": tuple(widths)}


def read_vae(source: Path) -> Parts:
    """A VAE alone, from a file of its own in either layout, a diffusers folder, or a checkpoint.

    Raises:
        UserError: it holds no VAE, is damaged, or NaN.
    """
    found = identify_source(source)
    if found.kind == "checkpoint":
        parts = read_parts(source)
        if "vae" not in parts.weights:
            raise UserError(f"{source} is a checkpoint without a VAE; give another file")
        weights, config = parts.weights["vae"], parts.configs.get("vae")
    else:
        require(found, ("vae",), source)
        if source.is_dir():
            tensors, config = read_weights_folder(source), read_json(source / "config.json")
        else:
            file = read_weights(source)
            tensors, config = file.tensors, _kept_configs(file).get("vae")
        weights = vae_to_diffusers(_part(tensors, PREFIXES["vae"]) or tensors)
        refuse_not_finite(weights, source)
    return Parts({"vae": weights}, {"vae": config} if config else {})
