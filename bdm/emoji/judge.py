"""The judges: they say which concept on which background, drawn in which look, a picture shows.

They are trained on real pictures only and share nothing with the generator: no weights, no latents, no
text. Two kinds share nothing with each other either, so that a picture that deceives one need not deceive
the other: their networks and their augmentations differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..formats.checkpoint import check_weights
from ..formats.weights import read_json, read_tensors
from ..shipped import find_path
from .world import LOOKS, TREATMENTS, Treatment

Architecture = Literal["convolutional", "transformer"]

#: What a judge's folder says of it in numbers.
SIZES = ("concepts", "colours", "width", "size")


@dataclass(frozen=True)
class Verdict:
    """Logits for B pictures.

    Attributes:
        concept: (B, concepts).
        colour: (B, colours).
        look: (B, 2), Twemoji and OpenMoji.
        treatment: (B, T), the treatments that the judge was made for.
    """

    concept: Tensor
    colour: Tensor
    look: Tensor
    treatment: Tensor


class JudgeModel(nn.Module):
    """A small classifier with four heads.

    Args:
        concepts: number of concepts.
        colours: number of background colours.
        width: channels of a convolutional judge's first stage, doubled up to twice; or of a transformer's
            tokens.
        size: side of the pictures, a multiple of 16; others are resized.
        treatments: the treatments that it tells apart, of ``bdm.emoji.world.TREATMENTS``.
        architecture: "convolutional": stages of 3x3 convolutions, each of half the size, down to 4x4.
            "transformer": a ViT (arXiv 2010.11929) on patches of 8x8 pixels.
    """

    def __init__(
        self,
        concepts: int,
        colours: int,
        width: int = 32,
        size: int = 64,
        treatments: Sequence[Treatment] = ("plain",),
        architecture: Architecture = "convolutional",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(zip(SIZES, (concepts, colours, width, size), strict=True))
        self.config |= {"treatments": list(treatments), "architecture": architecture}
        if architecture == "convolutional":
            self.features: nn.Module = _convolutions(width, size)
            flat = 4 * width * 16
        else:
            self.features = _Tokens(width, size)
            flat = 2 * width
        self.concept, self.colour = nn.Linear(flat, concepts), nn.Linear(flat, colours)
        self.look, self.treatment = nn.Linear(flat, len(LOOKS)), nn.Linear(flat, len(treatments))

    @property
    def augment(self) -> Callable[[Tensor, list[torch.Generator]], Tensor]:
        """How pictures are augmented in its training, and where its accuracy is measured."""
        return augment if self.config["architecture"] == "convolutional" else augment_crops

    def forward(self, pictures: Tensor) -> Verdict:
        """Judge (B, 3, H, W) pictures in [-1, 1]."""
        size = self.config["size"]
        if pictures.shape[-1] != size:
            pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True)
        features = self.features(pictures)
        return Verdict(
            self.concept(features), self.colour(features), self.look(features), self.treatment(features)
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write configuration and weights, in half precision: verdicts do not depend on the rest."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: tensor.half().contiguous() for key, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> JudgeModel:
        """Load a judge, in evaluation mode.

        Raises:
            UserError: the folder is not a judge's.
        """
        path = find_path(folder) / "config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} is not a judge's folder (no config.json); train one with configs/emoji/judge.yaml"
            )
        config = read_json(path)
        if not _is_known(config):
            raise UserError(
                f"{folder} is not a judge's folder, or one of an earlier version (its config.json is not that"
                f" of {', '.join(SIZES)}, treatments, architecture); train one with configs/emoji/judge.yaml"
            )
        judge = cls(**config)
        weights = read_tensors(path.with_name("model.safetensors"))
        check_weights(judge.state_dict(), weights, folder)
        judge.load_state_dict(weights)  # copied into float32
        return judge.eval()


def _is_known(config: dict[str, Any]) -> bool:
    """Whether a folder's configuration says what a judge needs, and nothing else."""
    treatments = config.get("treatments")
    return (
        set(config) == {*SIZES, "treatments", "architecture"}
        and all(isinstance(config[name], int) and config[name] > 0 for name in SIZES)
        and isinstance(treatments, list)
        and bool(treatments)
        and all(name in TREATMENTS for name in treatments)
        and config["architecture"] in get_args(Architecture)
    )


def _convolutions(width: int, size: int) -> nn.Sequential:
    """(B, 3, size, size) -> (B, 4 x width x 16)."""
    stages = max(3, (size // 4).bit_length() - 1)
    channels = [3, *(width * min(2**stage, 4) for stage in range(stages))]
    layers: list[nn.Module] = []
    for inner, outer in pairwise(channels):
        for source in (inner, outer):
            layers += [nn.Conv2d(source, outer, 3, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2))


class _Tokens(nn.Module):
    """(B, 3, size, size) -> (B, 2 x width).

    A vision transformer's first token, and the mean of the others.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=width, num_hidden_layers=4, num_attention_heads=max(1, width // 32),
            intermediate_size=3 * width, image_size=size, patch_size=8,
        )  # fmt: skip
        self.model = ViTModel(config, add_pooling_layer=False)

    def forward(self, pictures: Tensor) -> Tensor:
        states = self.model(pictures).last_hidden_state
        return torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)


def augment(pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
    """The convolutional judge's augmentation.

    Random shift, scale, rotation, blur, contrast and noise for (B, 3, H, W) pictures in [-1, 1].

    The border is repeated, so a plain background stays plain. Each picture draws from its own generator.
    """
    draws = torch.stack([torch.rand(8, generator=g) for g in generators]) * 2 - 1
    scale, angle = 1 + 0.1 * draws[:, 0], 0.1 * draws[:, 1]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([cos, -sin, 0.12 * draws[:, 2], sin, cos, 0.12 * draws[:, 3]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = (draws[:, 4] * 0.5 + 0.5).view(-1, 1, 1, 1)
    pictures = torch.lerp(pictures, blurred, blur)
    contrast, brightness = (1 + 0.08 * draws[:, 5]).view(-1, 1, 1, 1), (0.06 * draws[:, 6]).view(-1, 1, 1, 1)
    noise = torch.stack(
        [torch.randn(p.shape, generator=g) for p, g in zip(pictures, generators, strict=True)]
    )
    level = (0.04 * (draws[:, 7] + 1)).view(-1, 1, 1, 1)
    return pictures * contrast + brightness + noise * level


def augment_crops(pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
    """The transformer's augmentation.

    A random part of (B, 3, H, W) pictures in [-1, 1] is stretched to the whole, its tones are bent and its
    channels shifted, a square of it is greyed out, and coarse noise is added. Each picture draws from its own
    generator.
    """
    count, _, height, width = pictures.shape
    draws = torch.stack([torch.rand(12, generator=g) for g in generators])
    spread = draws * 2 - 1
    scale_x, scale_y = 1 + 0.12 * spread[:, 0], 1 + 0.12 * spread[:, 1]
    zero = torch.zeros(count)
    rows = torch.stack([scale_x, zero, 0.1 * spread[:, 2], zero, scale_y, 0.1 * spread[:, 3]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    gamma = torch.exp(0.15 * spread[:, 4]).view(-1, 1, 1, 1)
    pictures = (pictures.clamp(-1, 1) / 2 + 0.5).pow(gamma) * 2 - 1
    pictures = pictures + 0.06 * spread[:, 5:8].view(-1, 3, 1, 1)
    side = max(1, height // 6)
    for i, (y, x) in enumerate(
        (draws[:, 8:10] * torch.tensor([height - side, width - side])).long().tolist()
    ):
        pictures[i, :, y : y + side, x : x + side] = 0.0
    coarse = torch.stack([torch.randn(3, height // 4, width // 4, generator=g) for g in generators])
    level = (0.06 * draws[:, 10]).view(-1, 1, 1, 1)
    return pictures + level * F.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
