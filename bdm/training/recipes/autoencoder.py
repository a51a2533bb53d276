"""Pictures -> latents -> the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batch import Batch, fixed_batch
from ...data.source import Source, to_pixels, to_unit_range
from ...drawing.grid import labelled_grid
from .base import Recipe


class AutoencoderRecipe(Recipe):
    """L1 + MSE reconstruction with a small KL term; no adversarial or perceptual loss.

    Args:
        source: pictures.
        model: arguments of ``AutoencoderKL``.
        kl_weight: weight of the KL divergence per picture element.
        seed: seed of the weights.
    """

    divisible = True

    def __init__(self, source: Source, model: dict[str, Any], kl_weight: float, seed: int = 0) -> None:
        super().__init__(source, seed)
        torch.manual_seed(seed)
        self.vae = AutoencoderKL(**model)
        self.kl_weight = kl_weight

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def recomputable(self) -> dict[str, Any]:
        return {"vae": self.vae}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        x = to_unit_range(batch.pixels.to(self.vae.device)).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        z = posterior.mean + posterior.std * batch.randn(*posterior.mean.shape[1:]).to(x.device)
        y = self.vae.decode(z).sample  # pyright: ignore[reportAttributeAccessIssue]
        l1, mse, kl = F.l1_loss(y, x), F.mse_loss(y, x), posterior.kl().mean()
        return {
            "loss": l1 + mse + self.kl_weight * kl,
            "l1": l1.detach(),
            "mse": mse.detach(),
            "kl": kl.detach(),
        }

    @torch.no_grad()
    def grid(self) -> Image.Image:
        batch = fixed_batch(self.source, self.grid_size, self.seed)
        assert batch.pixels is not None
        x = to_unit_range(batch.pixels.to(self.vae.device))
        y = self.vae.decode(self.vae.encode(x).latent_dist.mode()).sample  # pyright: ignore[reportAttributeAccessIssue]
        rows = zip(x.cpu().split(8), y.cpu().split(8), strict=True)
        return labelled_grid(to_pixels(torch.cat([row for pair in rows for row in pair])), columns=8)

    @torch.no_grad()
    def finish(self, count: int = 512) -> None:
        """Set ``scaling_factor`` so that scaled latents have unit standard deviation, as Stable Diffusion's
        have.
        """
        batch = fixed_batch(self.source, count, self.seed)
        assert batch.pixels is not None
        pieces = [to_unit_range(x.to(self.vae.device)) for x in batch.pixels.split(64)]
        z = [self.vae.encode(x).latent_dist.mode() for x in pieces]  # pyright: ignore[reportAttributeAccessIssue]
        self.vae.register_to_config(scaling_factor=round(1 / torch.cat(z).std().item(), 5))

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)
