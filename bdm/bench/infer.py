"""Guided drawing: a bilingual pipeline beside diffusers' UNet and ControlNet on the doubled batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import BenchDrawConfig
from ..models.backbone import decode_latents
from ..pipeline import BridgePipeline
from ..text.english import encode_english
from .compare import OURS, Bench, Side, count_flops, stopwatch
from .networks import Networks, build_networks, peer_controlnet

PROMPT = "红灯笼，蓝色背景"


class InferBench(Bench):
    """Denoising (and decoding, if the configuration says so) of the same latents under the same texts.

    The peer does what the official pipeline does in every step: branch and backbone on [negative, positive],
    all of it. It is not charged for the convolutions of a condition picture, which Bridge Diffusion Models
    do not have. We have called ``optimize()``; "bdm unprepared" has not, and "bdm plain" does without all
    savings (``share=False``).
    """

    def __init__(self, config: BenchDrawConfig) -> None:
        self.config = config
        self.peers = config.peers
        self._networks: Networks | None = None

    def side(self, name: str, count: bool = True) -> Side:
        if name == OURS:  # with weights of its own, because they stay packed while the others run
            return self._ours(build_networks(self.config), count, prepared=True)
        self._networks = networks = self._networks or build_networks(self.config)
        if name in ("bdm unprepared", "bdm plain"):
            return self._ours(networks, count, prepared=False, share=name == "bdm unprepared")
        unet, controlnet = networks.unet, peer_controlnet(networks.unet, networks.branch)
        flops = count_flops(lambda: self._draw(networks, unet, controlnet)) if count else None
        if name == "diffusers compiled":
            unet, controlnet = torch.compile(unet), torch.compile(controlnet)
        return Side(
            lambda: stopwatch(lambda: self._draw(networks, unet, controlnet)),
            lambda: self._draw(networks, unet, controlnet), flops,
        )  # fmt: skip

    def _ours(self, networks: Networks, count: bool, prepared: bool, share: bool = True) -> Side:
        pipe = BridgePipeline(
            networks.vae,
            networks.text_encoder,
            networks.tokenizer,
            networks.unet,
            networks.scheduler,
            networks.branch,
            networks.native_text_encoder,
        )
        pipe.set_progress_bar_config(disable=True)
        config = self.config
        if prepared:
            side = config.latents * pipe.vae_scale_factor
            pipe.optimize(height=side, width=side, count=config.batch)

        def draw() -> Tensor:
            with torch.no_grad():
                return pipe(
                    **self._texts(networks), latents=self._latents(networks), guidance_scale=config.guidance,
                    num_inference_steps=config.steps, output_type="pt" if config.decode else "latent",
                    share=share,
                ).images  # fmt: skip

        flops = count_flops(draw) if count else None
        return Side(lambda: stopwatch(draw), draw, flops)

    def _latents(self, networks: Networks) -> Tensor:
        shape = (self.config.batch, 4, self.config.latents, self.config.latents)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.config.seed)).to(
            networks.unet.device, networks.unet.dtype
        )

    def _texts(self, networks: Networks) -> dict[str, Any]:
        """Prompts where there are text encoders, else random features.

        For ours, under the pipeline's names.
        """
        if networks.native_text_encoder is not None:
            return {"prompt": [PROMPT] * self.config.batch}
        generator = torch.Generator().manual_seed(self.config.seed + 1)

        def features(length: int, width: int) -> Tensor:
            value = torch.randn(self.config.batch, length, width, generator=generator)
            return value.to(networks.unet.device, networks.unet.dtype)

        width = networks.unet.config["cross_attention_dim"]
        english = features(77, width)
        return {
            "prompt_embeds": features(52, self.config.native_width),
            "negative_prompt_embeds": features(52, self.config.native_width),
            "prompt_en_embeds": english, "negative_prompt_en_embeds": english,
        }  # fmt: skip

    def _doubled_texts(self, networks: Networks) -> tuple[Tensor, Tensor]:
        """Native and English features of [negative, positive]."""
        if networks.native_text_encoder is not None:
            native = networks.native_text_encoder.encode(
                [""] * self.config.batch + [PROMPT] * self.config.batch
            )
            return native, encode_english(
                [""] * 2 * self.config.batch, networks.text_encoder, networks.tokenizer
            )
        texts = self._texts(networks)
        native = torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]])
        return native, torch.cat([texts["negative_prompt_en_embeds"], texts["prompt_en_embeds"]])

    @torch.no_grad()
    def _draw(self, networks: Networks, unet: Any, controlnet: Any) -> Tensor:
        native, english = self._doubled_texts(networks)
        scheduler = networks.scheduler
        scheduler.set_timesteps(self.config.steps)
        latents = self._latents(networks) * scheduler.init_noise_sigma
        picture = latents.new_zeros(len(native), 3, 1, 1)
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            down, middle = controlnet(doubled, t, native, picture, return_dict=False)
            eps = unet(
                doubled,
                t,
                english,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
            negative, positive = eps.chunk(2)
            latents = scheduler.step(
                negative + self.config.guidance * (positive - negative), t, latents, return_dict=False
            )[0]
        return (
            (decode_latents(networks.vae, latents) / 2 + 0.5).clamp(0, 1) if self.config.decode else latents
        )
