"""Captions and pictures -> one space where they meet (CLIP, arXiv 2103.00020; Chinese CLIP, arXiv
2211.01335).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batch import Batch
from ...data.source import Source, to_unit_range
from ...text.vocabulary import chinese_clip_tokenizer, clip_tokenizer
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


def uniformity_loss(features: Tensor, captions: list[str]) -> Tensor:
    """How unevenly texts lie on the sphere (arXiv 2005.10242, equation 4).

    ``log mean exp(-2 |f_i - f_j|^2)`` over pairs of different texts.

    Args:
        features: (B, D) unit vectors.
        captions: the B texts; equal ones are not pushed apart.
    """
    distance = torch.cdist(features, features).square()
    different = torch.tensor([[a != b for b in captions] for a in captions], device=features.device)
    return distance[different].mul(-2).exp().mean().log()


def gather_rows(features: Tensor) -> Tensor:
    """(P x B, D) rows of all processes from each one's (B, D), with gradients to whoever made them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return features
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features))


class ContrastiveRecipe(Recipe):
    """Trains a CLIP or Chinese CLIP from scratch; its text encoder is frozen in every later recipe.

    CLIP's loss asks only that the pooled text be found among a batch. On a small world a few directions are
    enough for that, and a UNet that reads such hidden states learns colours at once and shapes hardly at all.
    Two terms on the mean of the hidden states, which is what an untrained cross-attention sees, mend this:
    uniformity spreads the captions over the sphere, and a linear readout must predict a thumbnail of the
    picture, so that what things look like is in the features linearly.

    Args:
        source: pictures with captions.
        architecture: ``"clip"`` or ``"chinese_clip"``.
        text: changes to the architecture's default text configuration.
        vision: changes to its default vision configuration.
        temperature: fixed temperature of the similarities.
        uniformity: weight of the uniformity term.
        thumbnail: weight of the thumbnail term, relative to predicting the mean picture.
        seed: seed of the weights.
    """

    def __init__(
        self,
        source: Source,
        architecture: Literal["clip", "chinese_clip"],
        text: dict[str, Any],
        vision: dict[str, Any],
        *,
        temperature: float = 0.07,
        uniformity: float = 1.0,
        thumbnail: float = 2.0,
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
        config: Any = Config(
            text_config=text, vision_config=vision, projection_dim=128, logit_scale_init_value=scale
        )
        self.uniformity, self.thumbnail = uniformity, thumbnail
        #: Reads 16x16 thumbnails off the mean hidden state; used in training only.
        self.readout = nn.Linear(config.text_config.hidden_size, 3 * 16 * 16)
        self.clip: Any = Model(config)

    def parts(self) -> dict[str, nn.Module]:
        names = ("text_model", "vision_model", "text_projection", "visual_projection")
        parts: dict[str, nn.Module] = {name: getattr(self.clip, name) for name in names}
        return parts | {"readout": self.readout}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        device = self.clip.logit_scale.device
        tokens = self.tokenizer(
            batch.captions, return_tensors="pt", truncation=True, padding="max_length", max_length=self.length
        )  # fmt: skip
        ids = tokens.input_ids.to(device)
        # No mask: padding is attended in Stable Diffusion's and in the official native text encoding.
        pictures = to_unit_range(batch.pixels.to(device))
        output = self.clip(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures)
        hidden = output.text_model_output.last_hidden_state.mean(1)
        # In training a pair's negatives are those of all processes.
        rows = (output.text_embeds, output.image_embeds, F.normalize(hidden, dim=-1))
        captions = batch.captions
        if self.training:
            rows, captions = [gather_rows(row) for row in rows], gather_object(captions)
        texts, seen, spread_out = rows
        similarity = self.clip.logit_scale.exp() * texts @ seen.T
        contrast = contrastive_loss(similarity, captions)
        spread = uniformity_loss(spread_out, captions)
        thumbnails = F.adaptive_avg_pool2d(pictures, 16).flatten(1)
        unexplained = F.mse_loss(self.readout(hidden), thumbnails) / thumbnails.var(dim=0).mean()
        hits = (similarity.argmax(1) == torch.arange(len(similarity), device=device)).float().mean()
        terms = {"contrast": contrast, "uniformity": spread, "unexplained": unexplained}
        loss = contrast + self.uniformity * spread + self.thumbnail * unexplained
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, "accuracy": hits}

    def save(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
