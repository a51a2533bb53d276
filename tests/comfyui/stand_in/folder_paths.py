"""Where models are looked for."""

from __future__ import annotations

models_dir = ""
known: dict[str, list[str]] = {}


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    known.setdefault(folder_name, []).append(full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return list(known[folder_name])
