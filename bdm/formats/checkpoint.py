"""Whole SD1.5 models.

Single files in the original layout and diffusers folders, read into parts without any network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line, printable
from .choice import FileChoice
from .configs import ONE_TRANSFORMER, check_counts, part_config
from .control_signs import ControlSigns, control_signs
from .control_weights import config_beside, control_weights
from .identify import identify_source, require
from .names import (
    text_to_plain,
    text_to_prefixed,
    unet_to_diffusers,
    unet_to_original,
    vae_to_diffusers,
    vae_to_original,
)
from .noise import SD15_NOISE, Noise, folder_noise
from .remains import refuse_unknown
from .signs import MARKERS, file_noise
from .systems import refuse_as_english, refuse_other_systems
from .weights import (
    ANY_FILES,
    WeightFile,
    cast,
    json_object,
    read_json,
    read_weights,
    read_weights_folder,
    refuse_not_finite,
)
from .yaml_settings import yaml_configs

#: Prefixes of the parts in an original-layout file.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
#: Prefixes under which other programs save CLIP's text encoder.
_OTHER_TEXT = ("text_encoders.clip_l.", "clip_l.")
#: Key of the safetensors header under which the parts' configurations are kept; the original layout has no
#: place for them.
CONFIG_KEY = "bdm.config"
#: Among them, what the denoiser expects of its noise where that is not SD1.5's.
NOISE_KEY = "noise"


@dataclass(frozen=True)
class Parts:
    """The weights of a model by part ("unet", "vae", "text_encoder"), under diffusers' names.

    Attributes:
        weights: by part; a part that the file does not hold is missing.
        configs: the parts' configurations where the source keeps them.
        noise: what the source says of its denoiser's noise.
    """

    weights: dict[str, dict[str, Tensor]]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise: Noise = SD15_NOISE


def read_parts(
    source: Path,
    header_only: bool = False,
    names: Collection[str] = tuple(PREFIXES),
    files: FileChoice = ANY_FILES,
) -> Parts:
    """Read a checkpoint: a single file in the original layout, or a diffusers folder.

    EMA weights are used where a file holds nothing else.

    Args:
        source: file or folder.
        header_only: of a file read names and shapes, but no values (see ``read_weights``).
        names: the parts that are wanted.
        files: which of a folder's files.

    Raises:
        UserError: not an SD1.5 checkpoint, damaged, NaN, or with something in it whose meaning is not known.
    """
    if source.is_dir():
        # One without its text encoder is a latent diffusion model like any other.
        (refuse_as_english if "text_encoder" in names else refuse_other_systems)(source)
    require(identify_source(source), ("checkpoint",), source)
    if source.is_dir():
        noise = folder_noise(source)
        parts = {
            name: read_weights_folder(source / name, files)
            for name in names
            if (source / name / "config.json").is_file()
        }
        configs = {name: read_json(source / name / "config.json") for name in parts}
    else:
        file = read_weights(source, header_only)
        refuse_unknown(file.tensors, [*PREFIXES.values(), *_OTHER_TEXT], source)
        parts = {name: _part(file.tensors, PREFIXES[name]) for name in names}
        if "text_encoder" in names:
            parts["text_encoder"] |= {
                key: t for prefix in _OTHER_TEXT for key, t in _part(file.tensors, prefix).items()
            }
        if "unet" in names and not parts["unet"]:
            parts["unet"] = _averaged_unet(file)
        configs = _noted_configs(file)
        noise = file_noise(file, configs.pop(NOISE_KEY, None))
    convert = {"unet": unet_to_diffusers, "vae": vae_to_diffusers, "text_encoder": text_to_plain}
    weights = {name: convert[name](tensors) for name, tensors in parts.items() if tensors}
    configs = {name: config for name, config in configs.items() if name in weights}
    if "unet" in names and "unet" not in weights:
        raise UserError(f"{source} holds no unet; it is no complete checkpoint: get it again")
    for name, tensors in weights.items():
        if not header_only:
            refuse_not_finite(tensors, f"{source} ({name})")
    return Parts(weights, configs, noise)


def write_checkpoint(
    weights: Mapping[str, Mapping[str, Tensor]], noise: Noise = SD15_NOISE
) -> dict[str, Tensor]:
    """The tensors of an original-layout file.

    Args:
        weights: by part, under diffusers' names.
        noise: what the denoiser expects; other programs find it by tensors that are there to be found.
    """
    convert = {"unet": unet_to_original, "vae": vae_to_original, "text_encoder": text_to_prefixed}
    tensors = {}
    for name, prefix in PREFIXES.items():
        if name in weights:
            inner = "transformer." if name == "text_encoder" else ""
            tensors |= {
                f"{prefix}{inner}{key}": tensor for key, tensor in convert[name](weights[name]).items()
            }
    told = noise.told
    return tensors | {
        key: torch.empty(0) for key, (name, value) in MARKERS.items() if told.get(name) == value
    }


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
        raise UserError(
            f"{source} holds no {name.replace('_', ' ')}; give one beside it, or a complete checkpoint"
        )
    model = empty_part(name, parts, source)
    assign_weights(model, parts.weights[name], f"{source} ({name})", dtype)
    return model.eval().requires_grad_(False)


def empty_part(name: str, parts: Parts, source: object) -> Any:
    """The model of a part without its weights, which are on the meta device (see ``build_part``)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with _building(f"{source}: its {name} is no SD1.5 network"):
        config: Any = parts.configs.get(name)
        if name in parts.weights:
            config = part_config(name, parts.weights[name], config)
        if name == "unet":
            return UNet2DConditionModel.from_config(config)
        if name == "vae":
            return AutoencoderKL.from_config(config)
        return CLIPTextModel(CLIPTextConfig.from_dict(config))


@contextmanager
def _building(problem: str) -> Iterator[None]:
    """Build networks without weights from a configuration that a file tells, whatever the file says."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            yield
    except Exception as error:  # two libraries, each with checks and mistakes of its own
        said = error if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{problem} ({said}); get the file again") from None


def check_parts(parts: Parts, source: object) -> None:
    """Refuse parts whose weights are not whole networks.

    Raises:
        UserError: names a weight that is missing, superfluous or of another shape.
    """
    for name, weights in parts.weights.items():
        own = empty_part(name, parts, source).state_dict()
        check_weights(own, named_like(own, weights), f"{source} ({name})")


def assign_weights(
    model: Any, weights: Mapping[str, Tensor], source: object, dtype: torch.dtype | None = None
) -> None:
    """Make tensors a model's weights, all of them and in place of what it has.

    Raises:
        UserError: missing, superfluous or misshapen weights, or values that the dtype cannot hold.
    """
    own = model.state_dict()
    weights = named_like(own, weights)
    check_weights(own, weights, source)
    kept = {key: cast(tensor, dtype, key, source) for key, tensor in weights.items()}
    model.load_state_dict(kept, strict=True, assign=True)


def check_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: object) -> None:
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
        raise UserError(
            f"{source} {what} {len(missing or extra)} weights, such as"
            f" {printable((missing or extra)[0], 120)}; get the file again"
        )
    for key, tensor in given.items():
        if tensor.shape != own[key].shape:
            raise UserError(
                f"{source}: {printable(key, 120)} has shape {tuple(tensor.shape)}, this model's has"
                f" {tuple(own[key].shape)}; the file is made for a network of another size"
            )


def named_like(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Text weights under the names of the installed transformers, which dropped ``text_model.`` with version
    5.6.
    """
    return text_to_prefixed(weights) if any(key.startswith("text_model.") for key in own) else weights


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _averaged_unet(file: WeightFile) -> dict[str, Tensor]:
    """The UNet of a file that holds only its moving average, whose names have lost their dots."""
    from diffusers import UNet2DConditionModel

    averaged = _part(file.tensors, "model_ema.diffusion_model")
    config = _noted_configs(file).get("unet") or {"cross_attention_dim": 768}
    with _building(f"{file.path}: its averaged unet is no SD1.5 network"):
        # Sizes cannot be read off such names, but how many blocks there are can.
        told = {found[1] for key in averaged if (found := re.match(r"input_blocks(\d{1,3})0[a-z]", key))}
        check_counts(config, ONE_TRANSFORMER)
        if len(config.get("block_out_channels", range(4))) * (config.get("layers_per_block", 2) + 1) != len(
            told
        ):
            raise UserError(f"weights of {len(told)} blocks, and a configuration of another number")
        unet: Any = UNet2DConditionModel.from_config(config)
    names = {key.replace(".", ""): key for key in unet_to_original(unet.state_dict())}
    return {names.get(key, key): tensor for key, tensor in averaged.items()}


def _kept_configs(file: WeightFile) -> dict[str, dict[str, Any]]:
    kept = json_object(file.metadata.get(CONFIG_KEY, "{}"), f"{file.path}: {CONFIG_KEY} in its header")
    if not all(isinstance(config, dict) for config in kept.values()):
        raise UserError(f"{file.path}: {CONFIG_KEY} in its header is damaged; convert the file again")
    return kept


def _noted_configs(file: WeightFile) -> dict[str, dict[str, Any]]:
    """The parts' configurations, by the file's own header and by a yaml beside it.

    Raises:
        UserError: they contradict each other, or the yaml says what is not known.
    """
    noted = _kept_configs(file)
    for part, config in yaml_configs(file.path).items():
        kept = noted.get(part, {})
        for key in config.keys() & kept.keys():
            if config[key] != kept[key]:
                raise UserError(
                    f"{file.path}: its own header says {key} {printable(kept[key], 60)}, and the yaml beside"
                    f" it {printable(config[key], 60)}; remove the one that is wrong"
                )
        noted[part] = config | kept
    return noted


def load_controlnet(
    source: Path,
    dtype: torch.dtype | None = None,
    files: FileChoice = ANY_FILES,
    backbone: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Any:
    """A ``ControlNetModel`` from a diffusers folder or a single file in either layout.

    Its configuration says ``global_pool_conditions`` wherever something in or beside the source does, the
    file's name too.

    Args:
        source: file or folder.
        dtype: of the weights; None keeps the file's.
        files: which of a folder's files.
        backbone: gives the weights of a UNet under diffusers' names, which are added to those of a file of
            differences.

    Raises:
        UserError: not an SD1.5 ControlNet, damaged, NaN, with something in it whose meaning is not known, or
            a file of differences without a backbone.
    """
    from diffusers import ControlNetModel

    require(identify_source(source), ("controlnet",), source)
    if source.is_dir():
        tensors, config = read_weights_folder(source, files), read_json(source / "config.json")
        signs = ControlSigns(pooled="its configuration" if config.get("global_pool_conditions") else "")
    else:
        file = read_weights(source)
        tensors, config = file.tensors, _noted_configs(file).get("controlnet") or config_beside(source)
        signs = control_signs(file, config)
    weights = control_weights(tensors, signs, backbone, source)
    refuse_not_finite(weights, source)
    with _building(f"{source} is no SD1.5 ControlNet"):
        config = part_config("controlnet", weights, config)
        model: Any = ControlNetModel.from_config(config | {"global_pool_conditions": bool(signs.pooled)})
    assign_weights(model, weights, source, dtype)
    return model.eval().requires_grad_(False)


def read_vae(source: Path, files: FileChoice = ANY_FILES) -> Parts:
    """A VAE alone, from a file of its own in either layout, a diffusers folder, or a checkpoint.

    Args:
        source: file or folder.
        files: which of a folder's files.

    Raises:
        UserError: it holds no VAE, is damaged, or NaN.
    """
    found = identify_source(source)
    if found.kind == "checkpoint":
        parts = read_parts(source, names=("vae",), files=files)
        if "vae" not in parts.weights:
            raise UserError(f"{source} is a checkpoint without a VAE; give another file")
        weights, config = parts.weights["vae"], parts.configs.get("vae")
    else:
        require(found, ("vae",), source)
        if source.is_dir():
            tensors, config = read_weights_folder(source, files), read_json(source / "config.json")
        else:
            file = read_weights(source)
            tensors, config = file.tensors, _noted_configs(file).get("vae")
        if own := _part(tensors, PREFIXES["vae"]):
            refuse_unknown(tensors, (PREFIXES["vae"],), source)
        weights = vae_to_diffusers(own or tensors)
        refuse_not_finite(weights, source)
    return Parts({"vae": weights}, {"vae": config} if config else {})
