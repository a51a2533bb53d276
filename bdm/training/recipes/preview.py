"""The stock diffusers pipeline of a recipe's own parts, which draws its sample grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.backbone import decode_latents

#: Denoising steps of a grid's pictures.
GRID_STEPS = 20


def stock_pipeline(
    vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, controlnet: Any = None
) -> Any:
    """``StableDiffusionPipeline`` of these parts, or its ControlNet variant, without safety checker and
    progress bar.
    """
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    parts: dict[str, Any] = dict(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
    )
    none: dict[str, Any] = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe: Any = (
        StableDiffusionPipeline(**parts, **none)
        if controlnet is None
        else StableDiffusionControlNetPipeline(controlnet=controlnet, **parts, **none)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(
    pipe: Any,
    prompts: Tensor,
    negatives: Tensor,
    guidance: float,
    seed: int,
    steps: int = GRID_STEPS,
    **inputs: Any,
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1]; picture i uses seed + i.

    Args:
        pipe: from ``stock_pipeline``.
        prompts: (B, L, D) text features.
        negatives: the same of the negative prompts.
        guidance: guidance scale.
        seed: of the first picture.
        steps: denoising steps.
        inputs: further arguments of the pipeline, such as a ControlNet's ``image``.
    """
    latents = pipe(
        prompt_embeds=prompts,
        negative_prompt_embeds=negatives,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="latent",
        **inputs,
    ).images
    return decode_latents(pipe.vae, latents)
