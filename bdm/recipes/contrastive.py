"""Captions and pictures -> one space where they meet (CLIP, arXiv 2103.00020; Chinese CLIP, arXiv 2211.01335)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from ..data.source import Source, to_unit_range
from ..text.vocabulary import chinese_clip_tokenizer, clip_tokenizer
from .base import Recipe


def contrastive_loss(similarity: Tensor, captions: list[str]) -> Tensor:
    """Symmetric InfoNCE; pictures with the same caption share the target.

    Args:
        similarity: (B, B) scaled cosine similarities, texts by pictures.
        captions: the B texts.
    """
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([numbers[c] for c in captions], device=similarity.device)
    target = (label[:, None] == label[None, :]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


class ContrastiveRecipe(Recipe):
    """Trains a CLIP or Chinese CLIP from scratch; its text encoder is frozen in every later recipe.

    Args:
        source: pictures with captions.
        architecture: ``"clip"`` or ``"chinese_clip"``.
        text: changes to the architecture's default text configuration.
        vision: changes to its default vision configuration.
        projection_dim: width of the common space.
        seed: seed of the weights.
    """

    def __init__(
        self,
        source: Source,
        architecture: Literal["clip", "chinese_clip"],
        text: dict[str, Any],
        vision: dict[str, Any],
        projection_dim: int,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seed)
        torch.manual_seed(seed)
        if architecture == "clip":
            from transformers import CLIPConfig as Config
            from transformers import CLIPModel as Model

            self.tokenizer = clip_tokenizer()
        else:
            from transformers import ChineseCLIPConfig as Config
            from transformers import ChineseCLIPModel as Model

            self.tokenizer = chinese_clip_tokenizer()
        self.clip = Model(Config(text_config=text, vision_config=vision, projection_dim=projection_dim))  # pyright: ignore
        # English CLIP is causal, so what follows the end marker does not matter; Chinese CLIP's padding is attended in
        # the official inference, so it is trained with the same fixed length and without a mask.
        self.padding: dict[str, Any] = {"padding": True} if architecture == "clip" else {"padding": "max_length", "max_length": 52}

    def parts(self) -> dict[str, nn.Module]:
        return {"clip": self.clip}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        device = self.clip.logit_scale.device
        tokens = self.tokenizer(batch.captions, return_tensors="pt", truncation=True, **self.padding)
        ids = tokens.input_ids.to(device)
        output = self.clip(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=to_unit_range(batch.pixels.to(device)))
        similarity = output.logits_per_text
        hits = (similarity.argmax(1) == torch.arange(len(batch), device=device)).float().mean()
        return {"loss": contrastive_loss(similarity, batch.captions), "accuracy": hits.detach()}

    def save(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
