"""What a file or folder is, and what there is to say of it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError, printable, refused_paths
from .adapter import adapter_metadata, split_key
from .bundled import bundled_embeddings
from .connectors import connector_system
from .control_signs import control_signs
from .folders import read_json
from .hashes import file_hashes, source_hash
from .header import WeightFile, read_header
from .kinds import FileKind, Kind, base_of_width, identify
from .noise import folder_noise
from .piece_file import piece_facts
from .signs import file_noise, metadata_claims
from .systems import other_system, released_system
from .yaml_settings import yaml_configs

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
        base = "SD1.5 inpainting" if settings.get("in_channels") == 9 else base_of_width(width, kind)
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


def describe_file(path: Path) -> dict[str, str]:
    """Everything ``bdm inspect`` prints: kind, base, size, dtypes, what the trainer noted, signs, hashes.

    Loads no values. Texts are as they may be shown (see ``bdm.errors.printable``).

    Raises:
        UserError: it cannot be read.
    """
    with refused_paths(path):
        facts = _folder_facts(path) if os.path.isdir(path) else _file_facts(path)
    return {printable(name, 80): printable(text, 500) for name, text in facts.items()}


def _folder_facts(path: Path) -> dict[str, str]:
    found = identify_source(path)
    noted = _system_facts(path) if found.kind == "checkpoint" else {}
    return {"kind": str(found), **noted, "hash": source_hash(path)}


def _system_facts(path: Path) -> dict[str, str]:
    """What is told of a pipeline's folder: a native-language system by its name, and its noise."""
    if other := other_system(path):
        return {"system": f"{other}; this library draws with SD1.5"}
    noise = {"noise": str(folder_noise(path))}
    system = released_system(path)
    return noise if system is None else {"system": system.name, "trained": system.trained} | noise


def _file_facts(path: Path) -> dict[str, str]:
    if os.path.isfile(path) and (vocabulary := piece_facts(path)) is not None:
        return vocabulary | file_hashes(path)
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
    if system := connector_system(file.tensors):
        facts["system"] = f"{system}'s connector for another text encoder"
    if found.kind == "adapter":
        facts |= _adapter_facts(file)
    if found.kind == "embedding":
        facts["vectors"] = str(max(t.shape[0] if t.ndim == 2 else 1 for t in file.tensors.values()))
        facts["trigger"] = path.stem
    return facts | _signs(file, found.kind) | file_hashes(path)


def _signs(file: WeightFile, kind: Kind) -> dict[str, str]:
    """What is told beside the weights of what they mean; what is wrong with it where they contradict it."""
    try:
        if kind in ("checkpoint", "vae", "controlnet"):
            yaml_configs(file.path)  # which refuses what is not known
        if kind == "checkpoint":
            return {"noise": str(file_noise(file))}
        if kind == "controlnet":
            return {name: f"yes, by {sign}" for name, sign in vars(control_signs(file)).items() if sign}
        if kind == "adapter":
            bundled = bundled_embeddings(file)
            words = ", ".join(f"{name} ({len(vectors)} vectors)" for name, vectors in bundled.items())
            claims = ", ".join(f"{claim.name} {claim.value}" for claim in metadata_claims(file))
            return {name: text for name, text in (("embeddings", words), ("noted noise", claims)) if text}
    except UserError as error:
        return {"problem": str(error)}
    return {}


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
