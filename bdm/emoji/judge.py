"""The judge: says which concept on which background, drawn in which look, a picture shows.

It is trained on real pictures only and shares nothing with the generator: no weights, no latents, no text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..formats.checkpoint import check_weights
from ..formats.weights import read_json, read_tensors
from ..shipped import find_path
from .world import LOOKS, TREATMENTS, Treatment

#: What a judge's folder says of it.
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
    """A small convolutional classifier with four heads.

    Args:
        concepts: number of concepts.
        colours: number of background colours.
        width: channels of the first stage; doubled twice.
        size: side of the pictures; others are resized.
        treatments: the treatments that it tells apart, of ``bdm.emoji.world.TREATMENTS``.
    """

    def __init__(
        self,
        concepts: int,
        colours: int,
        width: int = 32,
        size: int = 32,
        treatments: Sequence[Treatment] = ("plain",),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(zip(SIZES, (concepts, colours, width, size), strict=True))
        self.config["treatments"] = list(treatments)
        channels = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for inner, outer in zip(channels, channels[1:], strict=False):
            for source in (inner, outer):
                layers += [nn.Conv2d(source, outer, 3, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2))
        flat = channels[-1] * 16
        self.concept, self.colour = nn.Linear(flat, concepts), nn.Linear(flat, colours)
        self.look, self.treatment = nn.Linear(flat, len(LOOKS)), nn.Linear(flat, len(treatments))

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
        treatments = config.get("treatments")
        if (
            set(config) != {*SIZES, "treatments"}
            or not all(isinstance(config[name], int) and config[name] > 0 for name in SIZES)
            or not (
                isinstance(treatments, list) and treatments and all(name in TREATMENTS for name in treatments)
            )
        ):
            raise UserError(
                f"{folder} is not a judge's folder (its config.json is not that of {', '.join(SIZES)},"
                " treatments); train one with configs/emoji/judge.yaml"
            )
        judge = cls(**config)
        weights = read_tensors(path.with_name("model.safetensors"))
        check_weights(judge.state_dict(), weights, folder)
        judge.load_state_dict(weights)  # copied into float32
        return judge.eval()


def augment(pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Random shift, scale, rotation, blur, contrast and noise for (B, 3, H, W) pictures in [-1, 1].

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
