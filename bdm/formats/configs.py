"""Configurations of networks, read off the shapes of their weights, or checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError, printable
from .names import UNetBuild, largest_block
from .settings import class_defaults, refuse_unknown_settings

#: Settings that SD1.5 does not share with the defaults of its classes and that no weight tells.
_UNET = {"attention_head_dim": 8, "sample_size": 64}
_VAE = {"sample_size": 512, "scaling_factor": 0.18215}
_TEXT = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
    "projection_dim": 768,
}
#: Settings that decide how many modules are built, or how long a table is worked out. Nothing bounds them in
#: a file but the weights that it holds for those modules.
_COUNTS = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "conditioning_embedding_out_channels",
    "num_hidden_layers",
    "max_position_embeddings",
)
#: What no SD1.5 network has more of.
ONE_TRANSFORMER = {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None}


def unet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``UNet2DConditionModel`` (or ControlNet, or branch), read off its
    shapes.

    Raises:
        UserError: names of no UNet.
        LookupError: weights that tell a size are missing or have too few dimensions (StopIteration where it
            is all attention).
    """
    build = UNetBuild.of(weights)
    down = tuple(
        "CrossAttnDownBlock2D" if i in build.attention else "DownBlock2D" for i in range(build.levels)
    )
    up = tuple(
        "CrossAttnUpBlock2D" if build.levels - 1 - i in build.attention else "UpBlock2D"
        for i in range(build.levels)
    )
    widths = tuple(weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(build.levels))
    text = next(tensor.shape[1] for key, tensor in weights.items() if key.endswith("attn2.to_k.weight"))
    return {
        "block_out_channels": widths,
        "layers_per_block": build.layers,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": text,
        "in_channels": weights["conv_in.weight"].shape[1],
        **_UNET,
    }


def vae_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``AutoencoderKL``, read off its shapes.

    Raises:
        UserError: names of no VAE.
        LookupError: weights that tell a size are missing or have too few dimensions.
    """
    levels = 1 + largest_block(r"encoder\.down_blocks\.(\d+)\.", weights)
    layers = 1 + largest_block(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", weights)
    widths = tuple(weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        **_VAE,
    }


def text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of a CLIP text encoder, read off its shapes; heads are 64 wide, as in every CLIP.

    Raises:
        UserError: names of no text encoder.
        LookupError: weights that tell a size are missing or have too few dimensions.
    """
    tokens, width = weights["embeddings.token_embedding.weight"].shape[:2]
    return _TEXT | {
        "vocab_size": tokens,
        "max_position_embeddings": weights["embeddings.position_embedding.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1 + largest_block(r"encoder\.layers\.(\d+)\.", weights),
        "num_attention_heads": max(1, width // 64),
    }


def controlnet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an SD1.5-like ``ControlNetModel``, read off its shapes.

    Raises:
        UserError: names of no ControlNet.
        LookupError: weights that tell a size are missing or have too few dimensions.
    """
    config = unet_config(weights)
    path = "controlnet_cond_embedding"
    # The path's widths: the first convolution, then every second block widens.
    blocks = sorted(
        int(key.split(".")[2])
        for key in weights
        if key.startswith(f"{path}.blocks.") and key.endswith(".weight")
    )
    widths = [
        weights[f"{path}.conv_in.weight"].shape[0],
        *(weights[f"{path}.blocks.{i}.weight"].shape[0] for i in blocks[1::2]),
    ]
    kept = {
        key: config[key]
        for key in ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
    }
    kept |= {"in_channels": config["in_channels"], "attention_head_dim": config["attention_head_dim"]}
    return kept | {"conditioning_embedding_out_channels": tuple(widths)}


_INFER = {
    "unet": unet_config,
    "vae": vae_config,
    "text_encoder": text_config,
    "controlnet": controlnet_config,
}


def part_config(name: str, weights: Mapping[str, Tensor], noted: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration of a network whose file may note one.

    Args:
        name: "unet", "vae", "text_encoder" or "controlnet".
        weights: under diffusers' names.
        noted: what the file says; its settings count before what the shapes tell.

    Raises:
        UserError: more or fewer modules are noted than there are weights for, or a setting that is not known.
    """
    told = _INFER[name](weights)
    if not noted:
        return told
    check_counts(noted, told | ONE_TRANSFORMER)
    refuse_unknown_settings(name, noted)
    # Of a transformers configuration nothing else: it also says which code is to compute the attention.
    return told | {key: value for key, value in noted.items() if key in told or name != "text_encoder"}


def check_counts(noted: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for other modules than those that there are weights for.

    Raises:
        UserError: names the setting, what it says and what the weights tell.
    """
    for key in _COUNTS:
        if key in told and _listed(noted.get(key, told[key])) != _listed(told[key]):
            raise UserError(
                f"the configuration says {key} {printable(noted[key], 60)}, the weights say {told[key]}; get"
                " the file again"
            )


def differs(name: str, noted: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether a configuration says anything else than what a file without one would be read as."""
    # Of a text encoder only the told settings count.
    plain = ({} if name == "text_encoder" else class_defaults(name)) | _INFER[name](weights)
    return any(_listed(noted[key]) != _listed(plain[key]) for key in noted.keys() & plain.keys())


def _listed(value: Any) -> Any:
    """JSON knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
