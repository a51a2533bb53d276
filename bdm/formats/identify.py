"""What a weight file is, from its names and shapes alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from .adapter import adapter_metadata, split_key
from .folders import read_json, weight_files
from .header import WeightFile, looks_like_safetensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal[
    "checkpoint", "unet", "vae", "text encoder", "controlnet", "branch", "adapter", "embedding", "unknown"
]

#: Width of the text features that a UNet, ControlNet, adapter or embedding of each base reads.
_BASES = {768: "SD1.5", 1024: "SD2", 1280: "SDXL", 2048: "SDXL"}
#: Names that only occur in models of other families.
_FAMILIES = {
    "joint_blocks": "SD3",
    "double_blocks": "FLUX",
    "single_blocks": "FLUX",
    "single_transformer_blocks": "FLUX",
    "transformer.transformer_blocks.": "FLUX or SD3",
    "conditioner.embedders.": "SDXL",
    "label_emb.": "SDXL",
    "add_embedding.linear_1": "SDXL",
    "lora_te2_": "SDXL",
    "text_encoder_2.": "SDXL",
    "clip_g": "SDXL",
    "cond_stage_model.model.": "SD2",
}
#: SD1.5 has one transformer block in a place where SDXL has up to ten.
_SECOND_BLOCK = re.compile(
    r"(?:attentions|input_blocks|middle_block|output_blocks)[._\d]+transformer_blocks[._][1-9]"
)
#: Bases of diffusers pipelines, by the start of their class's name; "" for SD1.5's, whose folder then lacks
#: its UNet.
_PIPELINES = {
    "Flux": "FLUX",
    "StableDiffusion3": "SD3",
    "StableDiffusionXL": "SDXL",
    "StableDiffusion": "",
    "Bridge": "",
    "PixArt": "PixArt",
    "Sana": "Sana",
    "Qwen": "Qwen-Image",
}
_CLASSES: dict[str, Kind] = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "ControlNetModel": "controlnet",
    "ControlNetModelBDM": "branch",
    "BranchModel": "branch",
}


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        kind: the role it plays in a pipeline; an adapter is a LoRA or one of its relatives.
        base: the model family it is made for: "SD1.5", "SD2", "SDXL", "SD3", "FLUX"; "SD1.5 inpainting" and
            so on for modified UNets; "width N" for a small model that only differs from SD1.5 in its text
            width; "" if nothing tells.
        layout: whose names it uses: "original", "diffusers", "kohya", "A1111", "BDM".
    """

    kind: Kind
    base: str
    layout: str

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.base, self.kind, f"({self.layout} layout)" if self.layout else ""))
        )


def identify(tensors: Mapping[str, Tensor]) -> FileKind:
    """Say what a mapping of names to tensors (possibly on the meta device) is."""
    keys = list(tensors)
    kind, layout = _kind(tensors)
    base = next((name for part, name in _FAMILIES.items() if any(part in key for key in keys)), "")
    if not base and any(_SECOND_BLOCK.search(key) for key in keys):
        base = "SDXL"
    if not base and kind in ("checkpoint", "unet", "vae", "controlnet", "branch", "adapter", "embedding"):
        base = _modified(tensors, kind) or _base_of_width(_text_width(tensors, kind), kind)
    return FileKind(kind, base, layout)


def identify_source(source: Path) -> FileKind:
    """Say what a local file or diffusers folder is.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    if not source.is_dir():
        return identify(read_header(source).tensors)
    if (source / "model_index.json").is_file():
        if (source / "unet" / "config.json").is_file():
            return FileKind("checkpoint", identify_source(source / "unet").base, "diffusers")
        pipeline = str(read_json(source / "model_index.json").get("_class_name", ""))
        base = next((name for start, name in _PIPELINES.items() if pipeline.startswith(start)), pipeline)
        return FileKind("checkpoint", base, "diffusers")
    config = source / "config.json"
    if not config.is_file():
        raise UserError(f"{source} is no model folder: it has neither model_index.json nor config.json")
    settings = read_json(config)
    kind = _CLASSES.get(
        str(settings.get("_class_name", "")), "text encoder" if "model_type" in settings else "unknown"
    )
    width = settings.get("cross_attention_dim")
    if settings.get("addition_embed_type") == "text_time":
        base = "SDXL"
    elif kind in ("unet", "controlnet") and isinstance(width, int):
        base = "SD1.5 inpainting" if settings.get("in_channels") == 9 else _base_of_width(width, kind)
    else:
        base = ""
    return FileKind(kind, base, "diffusers")


def require(found: FileKind, allowed: tuple[Kind, ...], source: object) -> None:
    """Refuse a file of another kind or for another base, by name.

    Raises:
        UserError: says what it is and what is allowed.
    """
    wanted = " or ".join(allowed)
    if found.kind == "unknown" and found.base:
        raise UserError(
            f"{source} is made for {found.base}; this library draws with SD1.5: use one made for SD1.5"
        )
    if found.kind not in allowed:
        what = (
            f"is {'an' if str(found)[0] in 'aeiou' else 'a'} {found}"
            if found.kind != "unknown"
            else "is of an unknown kind"
        )
        raise UserError(f"{source} {what}; allowed here: {wanted} for SD1.5")
    if found.base and found.base != "SD1.5" and not found.base.startswith("width"):
        raise UserError(
            f"{source} is made for {found.base} ({found}); this library draws with SD1.5: use one made for"
            " SD1.5"
        )


def _kind(tensors: Mapping[str, Tensor]) -> tuple[Kind, str]:
    keys = tensors.keys()

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    # The first ControlNet files hold a whole checkpoint beside the control.
    if has("control_model.", "input_hint_block."):
        return "controlnet", "original"
    if has("model.diffusion_model.", "model_ema.diffusion_model"):
        return "checkpoint", "original"
    if has("controlnet_cond_embedding."):
        return "controlnet", "diffusers"
    if has("controlnet_down_blocks."):
        return "branch", "BDM"
    if has("string_to_param.") or has("emb_params") or keys == {"clip_l", "clip_g"}:
        return "embedding", "A1111"
    if has("conv_in.") and has("up_blocks."):
        return "unet", "diffusers"
    if has("input_blocks.") and has("output_blocks."):
        return "unet", "original"
    if has("encoder.down_blocks.", "encoder.down.", "first_stage_model."):
        return "vae", "diffusers" if has("encoder.down_blocks.") else "original"
    if has("embeddings.token_embedding.", "text_model.embeddings.", "cond_stage_model.transformer."):
        return "text encoder", "diffusers"
    split = [
        key
        for key in keys
        if split_key(key)[1] not in ("", "gain") or (split_key(key)[1] and key.startswith("lora_"))
    ]
    if (
        1 <= len(tensors) <= 2
        and not split
        and all(t.ndim in (1, 2) and not key.endswith(".weight") for key, t in tensors.items())
    ):
        return "embedding", "diffusers"
    if split and len(split) >= len(tensors) / 2:
        return "adapter", "kohya" if has("lora_unet_", "lora_te", "lycoris_") else "diffusers"
    return "unknown", ""


def _modified(tensors: Mapping[str, Tensor], kind: Kind) -> str:
    """The name of a UNet or VAE with other channels than SD1.5's."""
    for key in ("encoder.conv_out.weight", "first_stage_model.encoder.conv_out.weight"):
        if kind == "vae" and key in tensors and tensors[key].shape[:1] != (8,):
            return f"a model of {tensors[key].shape[0] // 2 if tensors[key].ndim else 0} latent channels"
    for key in ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight"):
        if key in tensors and tensors[key].ndim == 4 and tensors[key].shape[1] != 4:
            channels = tensors[key].shape[1]
            return {9: "SD1.5 inpainting", 8: "InstructPix2Pix"}.get(
                channels, f"a UNet of {channels} input channels"
            )
    return ""


def _text_width(tensors: Mapping[str, Tensor], kind: Kind) -> int | None:
    if kind == "embedding":
        return next((t.shape[-1] for t in tensors.values() if t.ndim), None)
    for key, tensor in tensors.items():
        if "attn2" in key and tensor.ndim >= 2 and "to_k" in key:
            if key.endswith("attn2.to_k.weight"):
                return tensor.shape[1]
            if split_key(key)[1] in ("down", "diff", "w1_b"):
                return tensor.shape[1]
    return None


def _base_of_width(width: int | None, kind: Kind) -> str:
    if width is None or kind in ("branch", "vae"):  # a branch reads any native encoder
        return ""
    return _BASES.get(width, f"width {width}")


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a file, and of its tensor data alone for safetensors (what A1111 shows for LoRA files)."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    has_header = looks_like_safetensors(path)
    with open(path, "rb") as file:
        if has_header:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            whole.update(length + header)
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            if has_header:
                data.update(chunk)
    hashes = {"sha256": whole.hexdigest(), "model hash": whole.hexdigest()[:10]}
    return hashes | ({"data hash": data.hexdigest()[:12]} if has_header else {})


def source_hash(source: Path) -> str:
    """The first ten digits of a file's SHA-256; of a folder's weight files together (those that are read)."""
    if source.is_file():
        return file_hashes(source)["model hash"]
    together = hashlib.sha256()
    folders = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for path in sorted(path for folder in folders for path in weight_files(folder)):
        together.update(file_hashes(path)["sha256"].encode())
    return together.hexdigest()[:10]


def describe_file(path: Path) -> dict[str, str]:
    """Everything ``bdm inspect`` prints: kind, base, size, dtypes, what the trainer noted, hashes.

    Loads no values.
    """
    if path.is_dir():
        return {"kind": str(identify_source(path)), "hash": source_hash(path)}
    file = read_header(path)
    found = identify(file.tensors)
    parameters = sum(t.numel() for t in file.tensors.values())
    facts = {
        "kind": found.kind,
        "base": found.base or "not told by the file",
        "layout": found.layout or "unknown",
    }
    if not file.tensors:
        raise UserError(f"{path} holds no tensors")
    facts["tensors"] = f"{len(file.tensors)} ({parameters:,} values)"
    facts["dtypes"] = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()}))
    if found.kind == "adapter":
        facts |= _adapter_facts(file)
    if found.kind == "embedding":
        facts["vectors"] = str(max(t.shape[0] if t.ndim == 2 else 1 for t in file.tensors.values()))
        facts["trigger"] = path.stem
    return facts | file_hashes(path)


def _adapter_facts(file: WeightFile) -> dict[str, str]:
    forms = {
        "down": "LoRA",
        "w1_a": "LoHa",
        "k1": "LoKr",
        "k1_a": "LoKr",
        "gain": "(IA)3",
        "factor": "(IA)3",
        "diff": "difference",
    }
    found, ranks = set(), set()
    for key, tensor in file.tensors.items():
        factor = split_key(key)[1]
        if factor in forms:
            found.add(forms[factor])
        if factor in ("magnitude", "row_magnitude"):
            found.add("DoRA")
        if factor in ("down", "w1_b", "k1_b", "k2_b") and tensor.ndim:
            ranks.add(tensor.shape[0])
    ranks_text = ", ".join(map(str, sorted(ranks)))
    facts = {"form": ", ".join(sorted(found))} | ({"ranks": ranks_text} if ranks else {})
    noted = adapter_metadata(file.path, file.metadata)
    return facts | {f"noted {name}": text for name, text in noted.items()}
