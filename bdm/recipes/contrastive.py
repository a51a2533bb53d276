"""Captions and pictures -> one space where they meet (CLIP, arXiv 2103.00020; Chinese CLIP, arXiv 2211.01335)."""

from __future__ import annotations

import math
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

    Two things differ from CLIP, both because a UNet's cross-attention will read all hidden states, not the pooled text:

    * A second InfoNCE term holds for the mean of all hidden states, what an untrained attention sees. With the pooled term
      alone the hidden states differ little between concepts, and a UNet learns a concept per direction very slowly.
    * The temperature is fixed and high (CLIP learns one down to 0.01): then captions must differ by large angles.

    Args:
        source: pictures with captions.
        architecture: ``"clip"`` or ``"chinese_clip"``.
        text: changes to the architecture's default text configuration.
        vision: changes to its default vision configuration.
        temperature: of both terms.
        seed: seed of the weights.
    """

    def __init__(
        self,
        source: Source,
        architecture: Literal["clip", "chinese_clip"],
        text: dict[str, Any],
        vision: dict[str, Any],
        temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seed)
        torch.manual_seed(seed)
        if architecture == "clip":
            from transformers import CLIPConfig as Config
            from transformers import CLIPModel as Model

            self.tokenizer, self.length = clip_tokenizer(), 77
        else:
            from transformers import ChineseCLIPConfig as Config
            from transformers import ChineseCLIPModel as Model

            self.tokenizer, self.length = chinese_clip_tokenizer(), 52
        scale = math.log(1 / temperature)
        # The hidden states are compared with the picture directly, so the common space is as wide as they are.
        config = Config(
            text_config=text, vision_config=vision, projection_dim=text["hidden_size"], logit_scale_init_value=scale
        )  # fmt: skip
        self.clip: Any = Model(config)

    def parts(self) -> dict[str, nn.Module]:
        names = ("text_model", "vision_model", "text_projection", "visual_projection")
        return {name: getattr(self.clip, name) for name in names}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        device = self.clip.logit_scale.device
        tokens = self.tokenizer(
            batch.captions, return_tensors="pt", truncation=True, padding="max_length", max_length=self.length
        )  # fmt: skip
        ids = tokens.input_ids.to(device)
        # No mask: padding is attended in Stable Diffusion's and in the official native text encoding.
        output = self.clip(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=to_unit_range(batch.pixels.to(device))
        )
        picture, scale = output.image_embeds, self.clip.logit_scale.exp()
        hidden = F.normalize(output.text_model_output.last_hidden_state.mean(1), dim=-1)
        pooled_loss = contrastive_loss(output.logits_per_text, batch.captions)
        hidden_loss = contrastive_loss(scale * hidden @ picture.T, batch.captions)
        hits = (output.logits_per_text.argmax(1) == torch.arange(len(batch), device=device)).float().mean()
        return {"loss": pooled_loss + hidden_loss, "hidden_loss": hidden_loss.detach(), "accuracy": hits}

    def save(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
