"""Decoding latents into pictures: the VAE as a call of ours runs it beside the VAE as it is."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import BenchDecodeConfig
from ..models.backbone import decode_latents
from ..speed.folding import fold_layers
from .compare import OURS, Bench, Side, count_flops, stopwatch
from .networks import build_vae


class DecodeBench(Bench):
    """The same VAE and latents on both sides. Our time includes preparing its layers and giving them back."""

    peers = ("diffusers",)

    def __init__(self, config: BenchDecodeConfig) -> None:
        self.config = config

    @cached_property
    def vae(self) -> Any:
        """The VAE that both sides decode with."""
        return build_vae(self.config)

    def side(self, name: str, count: bool = True) -> Side:
        draw = self._ours if name == OURS else self._plain
        return Side(lambda: stopwatch(draw), draw, count_flops(draw) if count else 0)

    def _ours(self) -> Tensor:
        with ExitStack() as stack:
            fold_layers(stack, self.vae, pack=True)
            pack_layers(stack, self.vae)
            return self._plain()

    @torch.no_grad()
    def _plain(self) -> Tensor:
        shape = (
            self.config.batch,
            self.vae.config["latent_channels"],
            self.config.latents,
            self.config.latents,
        )
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(self.config.seed))
        return decode_latents(self.vae, latents.to(self.vae.device, self.vae.dtype))
