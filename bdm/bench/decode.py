"""Decoding latents into pictures: the VAE as a call of ours runs it beside the VAE as it is."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import BenchDecodeConfig
from ..models.backbone import decode_latents
from ..speed.folding import fold_layers
from ..speed.packing import pack_layers
from .compare import OURS, Bench, Side, count_flops, stopwatch
from .networks import build_vae


class DecodeBench(Bench):
    """The same VAE and latents on both sides; ours is prepared once, as ``pipe.optimize()`` does."""

    peers = ("diffusers",)

    def __init__(self, config: BenchDecodeConfig) -> None:
        self.config = config

    @cached_property
    def vae(self) -> Any:
        """The VAE that both sides decode with."""
        return build_vae(self.config)

    @cached_property
    def prepared_vae(self) -> Any:
        """The same, with weights of its own, because they stay packed while the other decodes."""
        vae, stack = build_vae(self.config), ExitStack()
        fold_layers(stack, vae, pack=True)
        pack_layers(stack, vae)
        return vae

    def side(self, name: str, count: bool = True) -> Side:
        def draw() -> Tensor:
            return self._decode(self.prepared_vae if name == OURS else self.vae)

        draw()  # packs
        return Side(lambda: stopwatch(draw), draw, count_flops(draw) if count else None)

    @torch.no_grad()
    def _decode(self, vae: Any) -> Tensor:
        shape = (
            self.config.batch,
            vae.config["latent_channels"],
            self.config.latents,
            self.config.latents,
        )
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(self.config.seed))
        return decode_latents(vae, latents.to(vae.device, vae.dtype))
