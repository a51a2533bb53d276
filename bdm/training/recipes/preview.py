"""Sample grids: what a recipe shows while it trains, and how a stock diffusers pipeline draws it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ...data.source import Source, UnreadableExample
from ...models.backbone import Backbone, decode_latents
from .captions import EnglishCaptions, NativeCaptions

#: Denoising steps of a grid's pictures.
GRID_STEPS = 20


class Preview(Protocol):
    """Draws with what a recipe has learned so far."""

    def draw(self, prompts: Sequence[str], guidance: float, seed: int, held_out: Source) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]; picture i uses seed + i.

        Args:
            prompts: B texts.
            guidance: guidance scale.
            seed: of the first picture.
            held_out: examples for what else is needed to draw.
        """
        ...


class StockPreview:
    """Draws with ``StableDiffusionPipeline``, or its ControlNet variant, of a recipe's own parts.

    Args:
        stock: the parts.
        captions: how prompts are told; native ones take the place of the English ones.
        scheduler: in place of the stock one's.
        steps: denoising steps.
        guidance: in place of the grid's.
    """

    def __init__(
        self,
        stock: Backbone,
        captions: EnglishCaptions | NativeCaptions,
        scheduler: Any = None,
        steps: int = GRID_STEPS,
        guidance: float | None = None,
    ) -> None:
        self._stock, self.captions = stock, captions
        self._scheduler, self._steps, self._guidance = scheduler or stock.scheduler, steps, guidance

    def pipeline(self, controlnet: Any = None) -> Any:
        """The stock pipeline, without safety checker and progress bar."""
        from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

        stock = self._stock
        parts: dict[str, Any] = dict(
            vae=stock.vae,
            text_encoder=stock.text_encoder,
            tokenizer=stock.tokenizer,
            unet=stock.unet,
            scheduler=self._scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe: Any = (
            StableDiffusionPipeline(**parts)
            if controlnet is None
            else StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(
        self,
        prompts: Sequence[str],
        guidance: float,
        seed: int,
        held_out: Source,
        *,
        controlnet: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """See ``Preview``.

        Further ``inputs`` are arguments of the pipeline, such as a ControlNet's ``image``.
        """
        captions, pipe = self.captions, self.pipeline(controlnet)
        # Together, so that both are of one length.
        features = captions.encode([*captions.with_trigger(prompts), *[""] * len(prompts)])
        told, empty = features.chunk(2)
        latents = pipe(
            prompt_embeds=told,
            negative_prompt_embeds=empty,
            guidance_scale=guidance if self._guidance is None else self._guidance,
            num_inference_steps=self._steps,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            output_type="latent",
            **inputs,
        ).images
        return decode_latents(pipe.vae, latents)


def spread_captions(source: Source, count: int) -> list[str]:
    """At most ``count`` different captions of evenly spread examples.

    Those without one are left out, as in ``fixed_batch``.
    """
    captions = []
    for i in range(0, len(source), len(source) // count + 1):
        with suppress(UnreadableExample):
            captions.append(source.caption(i))
    return list(dict.fromkeys(captions))
