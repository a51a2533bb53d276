"""Reading a checkpoint.

Ours beside diffusers' ``from_single_file`` on the same random file of SD1.5's size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from ..config import BenchLoadConfig
from ..formats.checkpoint import write_checkpoint
from ..formats.names import text_to_plain
from ..models.noise_schedule import SD15_SCHEDULE
from ..text.vocabulary import clip_tokenizer
from .compare import Bench, Side, run_apart
from .networks import UNET, VAE
from .train import TEXT

#: What a diffusers folder's index says, so that the peer finds configurations without a network.
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.36.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}


class LoadBench(Bench):
    """Every run is a process of its own, with the imports and the tokenizer's package loaded before the clock
    starts.
    """

    peers = ("diffusers",)

    def __init__(self, config: BenchLoadConfig) -> None:
        self.config = config
        self._folder = Path(tempfile.mkdtemp(prefix="bdm-bench-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @cached_property
    def file(self) -> Path:
        """The checkpoint that is read, written when it is first asked for."""
        return write_model(self.config, self._folder)

    def side(self, name: str, count: bool = True) -> Side:
        return Side(
            lambda: self._run(name)["seconds"],
            lambda: torch.tensor(self._run(name)["sums"], dtype=torch.float64),
        )

    def memory(self, name: str) -> int:
        return self._run(name)["peak"]

    def _run(self, name: str) -> dict[str, Any]:
        return run_apart("bdm.bench.load_subprocess_main", name, str(self.file.parent), self.config.dtype)


def write_model(config: BenchLoadConfig, folder: Path) -> Path:
    """A random checkpoint in the original layout (``model.safetensors``), with a diffusers folder's
    configurations beside it.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(config.seed)
    with init_empty_weights():
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNET | config.unet), "vae": AutoencoderKL(**VAE | config.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT | config.text)),
        }  # fmt: skip
    weights: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        state = text_to_plain(part.state_dict()) if name == "text_encoder" else part.state_dict()
        weights[name] = {key: torch.rand(value.shape).mul_(0.02).half() for key, value in state.items()}
        (folder / name).mkdir()
        text = part.config.to_json_string() if name == "text_encoder" else part.to_json_string()
        (folder / name / "config.json").write_text(text)
    save_file(write_checkpoint(weights), folder / "model.safetensors")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SD15_SCHEDULE).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_INDEX))
    return folder / "model.safetensors"
