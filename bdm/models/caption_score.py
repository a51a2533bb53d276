"""How well caption and picture agree, by a whole Chinese CLIP (arXiv 2211.01335).

Japanese Stable Diffusion used CLOOB so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..formats.weights import read_json, read_weights_folder, resolve_folder
from ..text.encoders import read_encoder_config
from ..text.vocabulary import chinese_clip_tokenizer

#: Positions of a caption in Chinese CLIP.
LENGTH = 52


class CaptionScorer(nn.Module):
    """Pictures and captions -> cosine similarities.

    Args:
        source: folder or hub name of a whole Chinese CLIP, with picture encoder. Mean and deviation of the
            colours come from its ``preprocessor_config.json``; without one pictures are given in [-1, 1].
        mask: whether padding is hidden from attention, as in the released models.

    Raises:
        UserError: no such folder, or a text encoder alone.
    """

    def __init__(self, source: str, mask: bool = True) -> None:
        from transformers import ChineseCLIPModel

        super().__init__()
        self.mask = mask
        try:
            folder = resolve_folder(source)
        except UserError as error:
            raise UserError(f"scorer: {error}; or set scorer: null to prepare without scores") from None
        tensors = read_weights_folder(folder)
        if (
            read_json(folder / "config.json").get("model_type") != "chinese_clip"
            or "visual_projection.weight" not in tensors
        ):
            raise UserError(
                f"scorer {source} is no whole Chinese CLIP (text and picture encoder); give one, or set"
                " scorer: null"
            )
        config = read_encoder_config(folder)
        self.clip: Any = ChineseCLIPModel(config)
        # By hand, because from_pretrained zeroes the row of [PAD]. Poolers are not read.
        missing = [
            name
            for name in self.clip.load_state_dict(tensors, strict=False).missing_keys
            if "pooler" not in name
        ]
        if any(not name.endswith("position_ids") for name in missing):
            raise UserError(
                f"scorer {source} lacks {len(missing)} weights, such as {missing[0]}; get the folder again"
            )
        self.eval().requires_grad_(False)
        self.side: int = config.vision_config.image_size
        self.tokenizer = chinese_clip_tokenizer()
        mean, deviation = _colours(folder)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.deviation: Tensor

    def forward(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """(B,) cosine similarities of (B, 3, H, W) uint8 pictures, scaled to the encoder's square, and B
        captions.
        """
        device = self.mean.device
        pictures = F.interpolate(
            pixels.to(device).float() / 255,
            (self.side, self.side),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        ).clamp(0, 1)
        tokens = self.tokenizer(
            list(captions), return_tensors="pt", truncation=True, padding="max_length", max_length=LENGTH
        )
        ids = tokens.input_ids.to(device)
        mask = tokens.attention_mask.to(device) if self.mask else torch.ones_like(ids)
        output = self.clip(
            input_ids=ids, attention_mask=mask, pixel_values=(pictures - self.mean) / self.deviation
        )
        return (output.text_embeds * output.image_embeds).sum(-1).float()


def _colours(folder: Path) -> tuple[list[float], list[float]]:
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    return settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
