"""Pictures in a few steps.

A LoRA that makes the backbone consistent along its sampling path (LCM-LoRA, arXiv 2311.05556).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...data.source import Source
from ...method.loss import DenoisingLoss, Draws
from ...models.backbone import Backbone
from ...models.samplers import make_scheduler
from .community import community_recipe, load_stock
from .denoising import DenoisingRecipe, Told
from .lora import LoraDenoiser

#: How diffusers' ``LCMScheduler`` weighs input and prediction: its timestep scaling and sigma_data.
TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5

#: Below this the pseudo-Huber error is quadratic (the paper's c).
HUBER = 0.001

#: Steps of the sample grid.
FEW_STEPS = 4


class ConsistencyLoss(nn.Module):
    """Predictions of the path's end agree before and after a step of the guided teacher.

    Args:
        denoising: its schedule, timesteps and weights are taken.
        teacher: latents, timesteps and text -> prediction.
        guidance: bounds of the teacher's guidance scale, drawn anew for every sample.
        solver_steps: steps in which the teacher goes from noise to picture.
    """

    def __init__(
        self,
        denoising: DenoisingLoss,
        teacher: Callable[[Tensor, Tensor, Tensor], Tensor],
        guidance: tuple[float, float] = (2.0, 3.0),
        solver_steps: int = 50,
    ) -> None:
        super().__init__()
        self.denoising, self.schedule, self.teacher = denoising, denoising.schedule, teacher
        self.guidance, self.stride = guidance, len(self.schedule) // solver_steps

    def draw_timesteps(self, draws: Draws) -> Tensor:
        """See ``DenoisingLoss``."""
        return self.denoising.draw_timesteps(draws)

    def forward(self, denoise: Told, x_0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """(B,) weighted errors for (B, C, h, w) latents at timesteps (B,)."""
        return self.denoising.weight(t) * self.error(denoise, x_0, t, draws)

    def error(self, denoise: Told, x_0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """(B,) pseudo-Huber errors between the ends predicted before and after the teacher's step."""
        eps = draws.randn(*x_0.shape[1:]).to(x_0)
        t = t // self.stride * self.stride + self.stride - 1
        before = (t - self.stride).clamp(min=0)
        x_t = self.schedule.add_noise(x_0, eps, t)
        empty, (low, high) = denoise.empty(), self.guidance
        scale = (low + (high - low) * draws.rand()).to(x_t)
        with torch.no_grad():
            x_before = self.teach(x_t, t, before, denoise.text, empty, scale)
            target = self.end(denoise, x_before, before)
        difference = (self.end(denoise, x_t, t) - target).float()
        return ((difference.square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)

    def teach(
        self, x_t: Tensor, t: Tensor, before: Tensor, text: Tensor, empty: Tensor, scale: Tensor
    ) -> Tensor:
        """The samples at ``before`` after the teacher's guided DDIM step from (B, C, h, w) at ``t``."""
        both = self.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([empty, text]))
        negative, positive = both.chunk(2)
        guided = negative + scale.view(-1, 1, 1, 1) * (positive - negative)
        return self.schedule.add_noise(*self.schedule.split(x_t, guided, t), before)

    def end(self, denoise: Told, x_t: Tensor, t: Tensor) -> Tensor:
        """The end of the path, as ``LCMScheduler`` makes it of the network's prediction at timesteps (B,)."""
        scaled = (TIMESTEP_SCALING * t.float()).view(-1, 1, 1, 1)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return skip * x_t + out * self.schedule.split(x_t, denoise(x_t, t), t)[0]


def lcm_lora_recipe(
    source: Source,
    backbone: str | Backbone,
    *,
    guidance: tuple[float, float] = (2.0, 3.0),
    solver_steps: int = 50,
    rank: int = 8,
    alpha: int = 8,
    trigger: str = "",
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Distil guided sampling into a LoRA (see ``ConsistencyLoss`` and ``community_recipe``).

    The teacher is the backbone without the LoRA, so the file fits whatever is drawn with that backbone.
    """
    stock = load_stock(backbone)
    sampler = make_scheduler("LCM", stock.scheduler.config["prediction_type"])
    # What it learns has the guidance in it.
    preview: dict[str, Any] = dict(scheduler=sampler, steps=FEW_STEPS, guidance=1.0)
    denoiser = LoraDenoiser(stock, rank=rank, alpha=alpha, trigger=trigger, seed=seed, **preview)
    recipe = community_recipe(source, backbone, stock, denoiser, seed=seed, **rest)
    assert isinstance(recipe.loss, DenoisingLoss)
    recipe.loss = ConsistencyLoss(recipe.loss, denoiser.predict_without, guidance, solver_steps)
    return recipe
