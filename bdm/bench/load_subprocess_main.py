"""Loads a checkpoint in this process and prints seconds, peak and checksums.

``python -m bdm.bench.load_subprocess_main SIDE FOLDER DTYPE``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..text.vocabulary import clip_tokenizer
from .compare import OURS
from .memory import peak_memory


def loader(name: str, folder: Path, dtype: torch.dtype) -> Callable[[], Any]:
    """What loads the folder's single file; everything it imports is imported here."""
    if name == OURS:
        from ..models.backbone import load_backbone

        return lambda: load_backbone(folder / "model.safetensors", dtype)
    from diffusers import StableDiffusionPipeline

    load: Any = StableDiffusionPipeline.from_single_file
    return lambda: load(
        str(folder / "model.safetensors"),
        config=str(folder),
        local_files_only=True,
        torch_dtype=dtype,
        safety_checker=None,
    )


def main() -> None:
    """Load once, on the clock; then use every weight. The peak is what that takes beside the libraries."""
    name, folder, dtype = sys.argv[1:]
    clip_tokenizer()
    load = loader(name, Path(folder), getattr(torch, dtype))
    figures: dict[str, Any] = {}
    kept: list[Any] = []

    def run() -> None:
        start = time.perf_counter()
        kept.append(load())
        figures["seconds"] = time.perf_counter() - start
        # Weights of a mapped file take memory when they are read, which drawing does.
        for part in parts():
            for parameter in part.parameters():
                parameter.detach().sum()

    def parts() -> tuple[Any, ...]:
        return kept[0].unet, kept[0].vae, kept[0].text_encoder

    libraries = peak_memory(lambda: None)
    figures["peak"] = peak_memory(run) - libraries
    figures["sums"] = [
        sum(p.detach().double().abs().sum().item() for p in part.parameters()) for part in parts()
    ]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
