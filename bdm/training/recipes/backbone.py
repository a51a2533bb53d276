"""English captions -> a backbone of one's own: a small Stable Diffusion."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...data.source import Source
from ...models.backbone import Backbone, load_backbone, load_clip_text, load_vae
from ...models.noise_schedule import SD15_SCHEDULE
from .denoising import DenoisingRecipe
from .preview import draw_stock, stock_pipeline


class BackboneRecipe(DenoisingRecipe):
    """Trains a UNet beside a frozen VAE and CLIP text encoder: a small Stable Diffusion.

    Args:
        vae: the VAE, or its folder.
        text_encoder: the text part of a CLIP with CLIP's own vocabulary, or a CLIP's folder.
        unet: arguments of ``UNet2DConditionModel``, for a fresh one.
        backbone: a trained backbone, or its folder, file or hub name, to go on from in its place.
        rest: see ``DenoisingRecipe``.
    """

    def __init__(
        self,
        source: Source,
        vae: str | AutoencoderKL,
        text_encoder: str | CLIPTextModel,
        unet: dict[str, Any] | None = None,
        backbone: str | Backbone | None = None,
        seed: int = 0,
        **rest: Any,
    ) -> None:
        from ...text.vocabulary import clip_tokenizer

        folders = {
            name: Path(part)
            for name, part in (("vae", vae), ("text_encoder", text_encoder))
            if isinstance(part, str)
        }
        super().__init__(source, load_vae(vae) if isinstance(vae, str) else vae, seed=seed, **rest)
        self.check_cache(vae)
        self.text_encoder = load_clip_text(text_encoder) if isinstance(text_encoder, str) else text_encoder
        self.tokenizer = clip_tokenizer()
        self._cards = {name: folder / "card.json" for name, folder in folders.items()}
        torch.manual_seed(seed)
        if backbone is None:
            self.unet = UNet2DConditionModel(**unet or {})
        else:
            self.unet = (backbone if isinstance(backbone, Backbone) else load_backbone(backbone)).unet

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def recomputable(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        from ...text.english import encode_english

        return encode_english(texts, self.text_encoder, self.tokenizer)

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(x_t, t, text).sample

    def pipeline(self) -> Any:
        """A stock diffusers pipeline of the parts."""
        from diffusers import DDIMScheduler

        schedule: dict[str, Any] = {**SD15_SCHEDULE, "prediction_type": self.schedule.prediction}
        return stock_pipeline(
            self.vae, self.text_encoder, self.tokenizer, self.unet, DDIMScheduler(**schedule)
        )

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        positive, negative = self.encode_texts(prompts), self.encode_texts([""] * len(prompts))
        return draw_stock(self.pipeline(), positive, negative, self.grid_guidance, seed)

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)
        for part, card in self._cards.items():
            if card.is_file():
                shutil.copy(card, folder / part / "card.json")
