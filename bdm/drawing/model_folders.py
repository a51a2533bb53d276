"""Folders of community files as A1111 and ComfyUI keep them, and what lies in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..extras import require_packages
from ..formats.weights import WEIGHT_SUFFIXES

#: Kinds by the names of folders, in small letters: A1111's first, then ComfyUI's.
FOLDER_KINDS = {
    "stable-diffusion": "checkpoint",
    "vae": "vae",
    "lora": "adapter",
    "lycoris": "adapter",
    "controlnet": "controlnet",
    "embeddings": "embedding",
    "esrgan": "upscaler",
    "realesrgan": "upscaler",
    "checkpoints": "checkpoint",
    "diffusers": "checkpoint",
    "loras": "adapter",
    "t2i_adapter": "other",
    "upscale_models": "upscaler",
    "clip": "other",
    "clip_vision": "image_encoder",
    "text_encoders": "other",
    "hypernetworks": "other",
    "ipadapter": "ip_adapter",
}
#: Where A1111 and ComfyUI keep models, below their own folder.
_INSIDE = ("models", "embeddings", "extensions/sd-webui-controlnet/models")
_YAML = "extra_model_paths.yaml"
#: Folders in folders at most.
_DEPTH = 8


@dataclass(frozen=True)
class Entry:
    """A file or diffusers folder that was found.

    Attributes:
        path: where it lies.
        kind: what its folder says that it is; "" where that says nothing.
    """

    path: Path
    kind: str = ""


def entries(folder: Path) -> Iterator[Entry]:
    """What lies in a folder of models, by kind.

    Args:
        folder: A1111's or ComfyUI's own, their ``models`` folder, any folder of files, or an
            ``extra_model_paths.yaml``; one that lies in the folder is read too.

    Raises:
        UserError: there is no such folder, or the YAML cannot be read.
    """
    if folder.suffix.lower() in (".yaml", ".yml"):
        yield from _of_yaml(folder)
        return
    check_there(folder)
    if (folder / _YAML).is_file():
        yield from _of_yaml(folder / _YAML)
    inside = [folder / name for name in _INSIDE if (folder / name).is_dir()]
    whole = not (folder / "models").is_dir()
    for place in [folder] if whole else inside:
        yield from _walk(place, FOLDER_KINDS.get(place.name.lower(), ""), set(), 0)


def check_there(folder: Path) -> None:
    """Refuse a folder of models that is not there.

    Raises:
        UserError: names it.
    """
    if not folder.is_dir() and folder.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--models {folder}: no such folder; give one that holds checkpoints, LoRA ...")


def _of_yaml(file: Path) -> Iterator[Entry]:
    for kind, place in yaml_folders(file):
        if place.is_dir():
            yield from _walk(place, kind, set(), 0)


def yaml_folders(file: Path) -> list[tuple[str, Path]]:
    """(kind, folder) that ComfyUI's ``extra_model_paths.yaml`` names.

    Raises:
        UserError: it cannot be read, or is no mapping of programs to folders.
    """
    require_packages("a configuration")
    import yaml

    try:
        said: Any = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); mend it") from None
    if not isinstance(said, dict):
        raise UserError(f"{file} names no folders; give one as ComfyUI's extra_model_paths.yaml.example")
    found = []
    for program in said.values():
        if isinstance(program, dict):
            base = file.parent / os.path.expanduser(str(program.get("base_path") or ""))
            for name, places in program.items():
                kind = FOLDER_KINDS.get(str(name).lower(), "other")
                if name not in ("base_path", "is_default") and isinstance(places, str):
                    found += [(kind, base / line.strip()) for line in places.splitlines() if line.strip()]
    return found


def _walk(folder: Path, kind: str, seen: set[str], depth: int) -> Iterator[Entry]:
    """Files and diffusers folders below a folder, without what is hidden; links lead nowhere twice."""
    real = os.path.realpath(folder)
    if real in seen or depth > _DEPTH:
        return
    seen.add(real)
    try:
        inside = sorted(folder.iterdir())
    except OSError:  # not readable: others are
        return
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / "model_index.json").is_file() or (path / "config.json").is_file():
                yield Entry(path, kind)
            else:
                yield from _walk(path, FOLDER_KINDS.get(path.name.lower(), kind), seen, depth + 1)
        elif path.suffix.lower() in WEIGHT_SUFFIXES:
            yield Entry(path, kind)
