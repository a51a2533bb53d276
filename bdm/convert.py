"""Rewrite weight files between the layouts of the community; what is written is always safetensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError, first_line, printable
from .files import atomic_write, refuse_occupied, write_json
from .formats.adapter import KOHYA_ENDINGS, split_adapter
from .formats.bundled import bundled_embeddings, bundled_tensors
from .formats.change import Change
from .formats.checkpoint import (
    CONFIG_KEY,
    NOISE_KEY,
    Parts,
    build_part,
    check_parts,
    load_controlnet,
    read_parts,
    read_vae,
    write_checkpoint,
)
from .formats.configs import differs
from .formats.embedding import embedding_vectors
from .formats.identify import identify_source, require
from .formats.kinds import is_vectors
from .formats.names import controlnet_to_original, flat, vae_to_original
from .formats.noise import Noise
from .formats.signs import is_of_trainer
from .formats.weights import cast, read_weights, refuse_not_finite
from .method.branch import BranchModel
from .models.backbone import load_backbone

logger = logging.getLogger("bdm")

#: Rounding to bfloat16 changes a tensor by 0.2% of its size, to float16 by less.
_LARGEST_LOSS = 0.01

#: Layouts that ``convert`` writes, by kind; the first is the one of files, the others' ends are folders.
LAYOUTS = {
    "checkpoint": ("original", "diffusers"),
    "vae": ("original", "diffusers"),
    "controlnet": ("original", "diffusers"),
    "branch": ("diffusers", "BDM"),
    "adapter": ("kohya", "diffusers"),
    "embedding": ("A1111", "diffusers"),
}


def convert(
    source: Path, out: Path, layout: str, dtype: torch.dtype | None = None, modules: Any = None
) -> Path:
    """Write a file in another layout.

    Args:
        source: file or diffusers folder of any kind that ``LAYOUTS`` names.
        out: a ``.safetensors`` file, or a new or empty folder where the layout is one of folders (diffusers,
            BDM; not for adapters and embeddings).
        layout: see ``LAYOUTS``.
        dtype: of the written weights; None keeps the file's.
        modules: names of the modules that an adapter may change, by part ("unet", "text_encoder"); SD1.5's by
            default.

    Returns:
        ``out``.

    Raises:
        UserError: an unknown kind, a layout it does not have, a damaged or incomplete file, or a place that
            cannot be written to; nothing has changed then.
    """
    found = identify_source(source)
    require(found, tuple(LAYOUTS), source)  # pyright: ignore[reportArgumentType]
    if layout not in LAYOUTS[found.kind]:
        raise UserError(f"a {found.kind} has no {layout} layout; allowed: {', '.join(LAYOUTS[found.kind])}")
    folder = layout in ("diffusers", "BDM") and found.kind not in ("adapter", "embedding")
    if not folder and out.suffix.lower() != ".safetensors":
        raise UserError(f"{out}: the {layout} layout is one file; give a name that ends in .safetensors")
    if folder and out.suffix:
        raise UserError(f"{out}: the {layout} layout is a folder; give a name without an ending")
    if out.is_dir() and not folder:
        raise UserError(f"{out} is a folder; give the name of a file")
    place = out.resolve()  # "." has no name
    if folder:
        refuse_occupied(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as partial:
            _write(found.kind, source, partial, layout, folder, dtype, modules)
    except (OSError, SafetensorError) as error:  # safetensors hands on a full disk as an error of its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{out} cannot be written ({reason}); choose another place") from None
    return out


def _write(
    kind: str, source: Path, partial: Path, layout: str, folder: bool, dtype: torch.dtype | None, modules: Any
) -> None:
    if kind in ("adapter", "embedding"):
        write = _adapter if kind == "adapter" else _embedding
        tensors, metadata = write(source, layout, modules)
        _save(tensors, metadata, partial, dtype, source)
    elif folder:
        _FOLDERS[kind](source, layout, dtype).save_pretrained(partial)
        if layout == "BDM":
            config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
            write_json(partial / "config.json", config | {"_class_name": "ControlNetModelBDM"})
    else:
        tensors, metadata = _FILES[kind](source)
        _save(tensors, metadata, partial, dtype, source)


def _save(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    dtype: torch.dtype | None,
    source: Path,
) -> None:
    kept = {
        key: cast(t, dtype if t.is_floating_point() else None, key, source).contiguous()
        for key, t in tensors.items()
    }
    _warn_of_losses(tensors, kept)
    # safetensors refuses tensors that share memory, as tied weights of old pickles do.
    pointers: set[int] = set()
    for key, tensor in kept.items():
        if tensor.data_ptr() in pointers:
            kept[key] = tensor.clone()
        pointers.add(tensor.data_ptr())
    save_file(kept, path, metadata={"format": "pt", **metadata})


def _warn_of_losses(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Say which tensors a precision rounds by more than its last digit: values too small for it."""
    lost = []
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and kept[key].dtype != tensor.dtype:
            size = torch.linalg.vector_norm(tensor.double())
            if torch.linalg.vector_norm(kept[key].double() - tensor.double()) > _LARGEST_LOSS * size:
                lost.append(key)
    if lost:
        precision = str(kept[lost[0]].dtype).removeprefix("torch.")
        logger.warning(
            "%d tensors hold values too small for %s and change by more than %g of their size, such as %s;"
            " another precision keeps them",
            len(lost), precision, _LARGEST_LOSS, printable(lost[0], 120),
        )  # fmt: skip


def _checkpoint_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    parts = read_parts(source)
    check_parts(parts, source)
    return write_checkpoint(parts.weights, parts.noise), _noted(parts) | _noise_texts(parts.noise)


def _noise_texts(noise: Noise) -> dict[str, str]:
    """Header texts by which other programs, too, know a model that predicts velocity."""
    velocity = noise.prediction_type == "v_prediction"
    return {"modelspec.prediction_type": "v"} if velocity else {}


def _noted(parts: Parts) -> dict[str, str]:
    """Header texts with the configurations of parts that differ from what their weights tell.

    SD1.5's do not.
    """
    kept = {
        name: config for name, config in parts.configs.items() if differs(name, config, parts.weights[name])
    }
    if parts.noise.told:
        kept[NOISE_KEY] = parts.noise.settings
    return {CONFIG_KEY: json.dumps(kept)} if kept else {}


def _vae_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    parts = read_vae(source)
    check_parts(parts, source)
    return vae_to_original(parts.weights["vae"]), _noted(parts)


def _controlnet_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    model = load_controlnet(source)
    tensors = {
        f"control_model.{key}": tensor for key, tensor in controlnet_to_original(model.state_dict()).items()
    }
    return tensors, {CONFIG_KEY: json.dumps({"controlnet": _plain_config(model)})}


def _plain_config(model: Any) -> dict[str, Any]:
    return json.loads(model.to_json_string())


def _embedding(source: Path, layout: str, _: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = read_weights(source)
    width = next((t.shape[-1] for t in file.tensors.values() if is_vectors(t)), 0)
    vectors = embedding_vectors(file, width)
    return {"emb_params": vectors} if layout == "A1111" else {source.stem: vectors}, {}


def _adapter(source: Path, layout: str, modules: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter under kohya's or diffusers' names.

    Diffusers only has names for the low-rank form, scale folded in.
    """
    file = read_weights(source)
    refuse_not_finite(file.tensors, source)
    tensors: dict[str, Tensor] = {}
    for part, changes in split_adapter(file, modules or _sd15_modules()).items():
        for module, change in changes.items():
            _refuse_incomplete(source, module, change.factors)
            tensors |= (_kohya_keys if layout == "kohya" else _diffusers_keys)(source, part, module, change)
    bundled_embeddings(file)  # which refuses what is none
    kept = {key: text for key, text in file.metadata.items() if is_of_trainer(key)}
    return tensors | bundled_tensors(file.tensors), kept


#: Factors that are nothing without each other.
_PAIRS = (("up", "down"), ("w1_a", "w1_b"), ("w2_a", "w2_b"), ("k1_a", "k1_b"), ("k2_a", "k2_b"))


def _refuse_incomplete(source: Path, module: str, factors: Mapping[str, Tensor]) -> None:
    wanted = [name for pair in _PAIRS if factors.keys() & set(pair) for name in pair]
    if "row_magnitude" in factors:  # peft's DoRA, which is always on top of a low-rank product
        wanted += ["up", "down"]
    for name in wanted:
        if name not in factors:
            raise UserError(f"{source}: {module} has no {name} factor; the file is incomplete, get it again")
        if factors[name].ndim < 2:
            raise UserError(
                f"{source}: the {name} factor of {module} is no matrix; the file is damaged, get it again"
            )


def _kohya_keys(source: Path, part: str, module: str, change: Change) -> dict[str, Tensor]:
    prefix = flat(f"lora_unet_{module}" if part == "unet" else f"lora_te_text_model_{module}")
    factors = dict(change.factors)
    if "row_magnitude" in factors:
        rows = factors.pop("row_magnitude").flatten()
        factors["magnitude"] = rows.reshape(-1, *[1] * (factors["down"].ndim - 1))
    if "factor" in factors:
        factors |= _lycoris_gain(source, part, module, factors.pop("factor"))
    if "alpha" not in factors and "down" in factors:
        factors["alpha"] = torch.tensor(change.multiplier * factors["down"].shape[0])
    return {f"{prefix}.{KOHYA_ENDINGS[name]}": tensor for name, tensor in factors.items()}


def _lycoris_gain(source: Path, part: str, module: str, factor: Tensor) -> dict[str, Tensor]:
    """(IA)3 of peft, where 1 is neutral, as LyCORIS keeps it.

    0 is neutral, and a number says whether inputs are scaled.
    """
    if factor.ndim != 2 or 1 not in factor.shape:
        raise UserError(
            f"{source}: {module} holds an (IA)3 factor of shape {tuple(factor.shape)}, which LyCORIS has no"
            " names for"
        )
    on_input = factor.shape[0] == 1
    if not on_input and not (part == "unet" and module.endswith(("to_q", "to_k", "to_v"))):
        # The others have a bias, and peft scales whole outputs.
        raise UserError(
            f"{source}: {module}'s outputs are scaled with their bias, for which LyCORIS has no names; keep"
            " this file"
        )
    return {"gain": factor.flatten() - 1, "on_input": torch.tensor(int(on_input))}


def _diffusers_keys(source: Path, part: str, module: str, change: Change) -> dict[str, Tensor]:
    factors = change.factors
    other = sorted(factors.keys() - {"up", "down", "alpha", "magnitude", "row_magnitude"})
    if not other and "up" not in factors:
        other = ["no low-rank product"]
    if (
        "magnitude" in factors
        and "up" in factors
        and factors["magnitude"].shape[:1] != factors["up"].shape[:1]
    ):
        other = ["a magnitude over inputs"]
    if other:
        raise UserError(
            f"{source}: {module} holds {', '.join(other)}, for which diffusers has no names; keep the kohya"
            " layout"
        )
    prefix = f"unet.{module}" if part == "unet" else f"text_encoder.text_model.{module}"
    up = cast(factors["up"].float() * change.multiplier, factors["up"].dtype, f"{prefix} times alpha", source)
    keys = {f"{prefix}.lora_A.weight": factors["down"], f"{prefix}.lora_B.weight": up}
    for name in ("magnitude", "row_magnitude"):
        if name in factors:
            keys[f"{prefix}.lora_magnitude_vector"] = factors[name].flatten()
    return keys


def _sd15_modules() -> dict[str, list[str]]:
    """Module names of SD1.5's UNet and text encoder, from models without weights."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    return {
        "unet": [name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")],
        "text_encoder": [
            name.removesuffix(".weight").removeprefix("text_model.")
            for name in text.state_dict()
            if name.endswith(".weight")
        ],
    }


def _checkpoint_folder(source: Path, _: str, dtype: torch.dtype | None) -> Any:
    from diffusers import StableDiffusionPipeline

    stock = load_backbone(source, dtype)
    extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(
        vae=stock.vae,
        text_encoder=stock.text_encoder,
        tokenizer=stock.tokenizer,
        unet=stock.unet,
        scheduler=stock.scheduler,
        requires_safety_checker=False,
        **extra,
    )


def _vae_folder(source: Path, _: str, dtype: torch.dtype | None) -> Any:
    return build_part("vae", read_vae(source), source, dtype)


def _controlnet_folder(source: Path, _: str, dtype: torch.dtype | None) -> Any:
    return load_controlnet(source, dtype)


def _branch_folder(source: Path, _: str, dtype: torch.dtype | None) -> Any:
    return BranchModel.from_pretrained(source, torch_dtype=dtype)


_FILES: dict[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "checkpoint": _checkpoint_file, "vae": _vae_file, "controlnet": _controlnet_file,
}  # fmt: skip
_FOLDERS: dict[str, Callable[[Path, str, torch.dtype | None], Any]] = {
    "checkpoint": _checkpoint_folder,
    "vae": _vae_folder,
    "controlnet": _controlnet_folder,
    "branch": _branch_folder,
}
