"""What a yaml of the original program beside a file says of its networks, in diffusers' words.

Whatever is not translated and not known to be harmless stays under its own name, so that the readers of
configurations refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from .signs import yaml_beside

#: Classes of the original program, the last parts of their names, by what is built of them here.
_CLASSES = {
    "unet": ("UNetModel", "ControlledUnetModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("FrozenCLIPEmbedder",),
    "controlnet": ("ControlNet",),
}
#: Where the model's parameters describe each.
_PLACES = {
    "unet": "unet_config", "vae": "first_stage_config", "text_encoder": "cond_stage_config",
    "controlnet": "control_stage_config",
}  # fmt: skip
#: Settings of a UNet or ControlNet by diffusers' names.
_UNET = {
    "num_res_blocks": "layers_per_block", "transformer_depth": "transformer_layers_per_block",
    "context_dim": "cross_attention_dim", "use_linear_in_transformer": "use_linear_projection",
    "hint_channels": "conditioning_channels", "num_heads": "attention_head_dim",
}  # fmt: skip
_VAE = {"num_res_blocks": "layers_per_block", "z_channels": "latent_channels", "out_ch": "out_channels"}
#: Settings that change nothing of what given weights compute, or that their names tell.
_HARMLESS = {
    "unet": (
        "image_size", "use_checkpoint", "use_fp16", "use_bf16", "dropout", "legacy",
        "use_spatial_transformer", "attention_resolutions",
    ),
    "vae": ("resolution", "attn_resolutions", "attn_type", "dropout"),
    "text_encoder": ("device", "freeze"),
}  # fmt: skip
#: Settings that must have these values, and then say nothing.
_USUAL = {
    "unet": {"dims": 2, "conv_resample": True},
    "vae": {"double_z": True},
    "text_encoder": {"version": "openai/clip-vit-large-patch14", "max_length": 77, "layer": "last"},
}
#: Of the model itself: read elsewhere (``bdm.formats.signs`` and ``control_signs``), or of training alone.
_OF_MODEL = (
    "parameterization", "prediction_type", "zero_terminal_snr", "rescale_betas_zero_snr", "zsnr", "ztsnr",
    "linear_start", "linear_end", "timesteps", "beta_schedule", "scale_factor", "unet_config",
    "first_stage_config", "cond_stage_config", "control_stage_config", "only_mid_control",
    "global_average_pooling", "num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key",
    "control_key", "image_size", "channels", "cond_stage_trainable", "monitor", "use_ema", "scheduler_config",
    "sd_locked", "ckpt_path", "ignore_keys", "load_only_unet", "loss_type", "l_simple_weight",
    "original_elbo_weight", "learn_logvar", "logvar_init", "ucg_training", "unet_trainable", "scale_by_std",
    "base_learning_rate", "finetune_keys", "v_posterior", "clip_denoised", "cond_stage_forward",
)  # fmt: skip


def yaml_configs(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a yaml of the original program beside a file gives its networks.

    Args:
        path: of a checkpoint, VAE or ControlNet in one file.

    Returns:
        By part ("unet", "vae", "text_encoder", "controlnet"), for those that are described.

    Raises:
        UserError: the yaml cannot be read, or says what is not known here.
    """
    found = yaml_beside(path)
    if found is None:
        return {}
    beside, parameters = found
    where = f"{beside.name} beside {path}"
    if "ddconfig" in parameters:  # a VAE's own
        return {"vae": _vae(parameters)}
    _refuse_left_over(parameters, where)
    configs = {
        part: _part(part, parameters[key], where) for part, key in _PLACES.items() if key in parameters
    }
    return {part: config for part, config in configs.items() if config}


def _refuse_left_over(parameters: Mapping[Any, Any], where: str) -> None:
    for key, value in parameters.items():
        usual = key == "conditioning_key" and value == "crossattn"
        if key not in _OF_MODEL and not usual and value not in (None, False, "", [], {}):
            raise UserError(
                f"{where} says {printable(key, 60)} {printable(value, 60)}, and what that means is not known"
                " here; if it says nothing of the weights, remove that line"
            )


def _part(part: str, described: Any, where: str) -> dict[str, Any]:
    """The configuration of one network, of its class and its parameters."""
    if not isinstance(described, Mapping):
        raise UserError(f"{where} describes no {_PLACES[part]}; mend it or move it away")
    kind = str(described.get("target", _CLASSES[part][0])).rpartition(".")[2]
    if kind not in _CLASSES[part]:
        raise UserError(
            f"{where} says that the {part.replace('_', ' ')} is a {printable(kind, 60)}; SD1.5's is a"
            f" {_CLASSES[part][0]}: use an SD1.5 model"
        )
    parameters = described.get("params") or {}
    if not isinstance(parameters, Mapping):
        raise UserError(f"{where} gives {_PLACES[part]} no named params; mend it or move it away")
    if part == "vae":
        return _vae(parameters)
    if part == "text_encoder":
        return dict(_said("text_encoder", parameters, {}))
    return _unet(parameters)


def _vae(parameters: Mapping[str, Any]) -> dict[str, Any]:
    inner = parameters.get("ddconfig") or {}
    config = dict(_said("vae", inner if isinstance(inner, Mapping) else {"ddconfig": inner}, _VAE))
    _name_widths(config, "ch", "ch_mult")
    return config


def _unet(parameters: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(_said("unet", parameters, _UNET))
    widths = _name_widths(config, "model_channels", "channel_mult")
    each = config.get("num_head_channels")
    if each == -1:
        del config["num_head_channels"]
    elif widths and isinstance(each, int) and not isinstance(each, bool) and each > 0:
        del config["num_head_channels"]
        config["attention_head_dim"] = [width // each for width in widths]  # diffusers' name is historical
    if "use_scale_shift_norm" in config:
        shifts = config.pop("use_scale_shift_norm")
        config["resnet_time_scale_shift"] = "scale_shift" if shifts else "default"
    return config


def _said(part: str, parameters: Mapping[Any, Any], names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The settings that say something, under diffusers' names where there are such."""
    for key, value in parameters.items():
        if key in _USUAL[part] and value != _USUAL[part][key]:
            yield key, str(value)  # so that a False says something too
        elif key not in (*_HARMLESS[part], *_USUAL[part]):
            yield names.get(key, str(key)), value


def _name_widths(config: dict[str, Any], base: str, factors: str) -> list[int]:
    """Put diffusers' ``block_out_channels`` in place of a width and its factors, where both are numbers."""
    width, times = config.get(base), config.get(factors)
    whole = isinstance(times, list) and all(isinstance(number, int) for number in [width, *times])
    if not whole or width is None or times is None:
        return []
    del config[base], config[factors]
    config["block_out_channels"] = [width * factor for factor in times]
    return config["block_out_channels"]
