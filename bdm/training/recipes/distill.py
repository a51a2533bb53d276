"""Pictures in a few steps.

A LoRA that makes the backbone consistent along its sampling path (LCM-LoRA, arXiv 2311.05556).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.batch import Batch
from ...data.source import Source
from ...models.samplers import make_scheduler
from .community import LoraRecipe
from .preview import draw_stock, stock_pipeline

#: How diffusers' ``LCMScheduler`` weighs input and prediction: its timestep scaling and sigma_data.
TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5

#: Below this the pseudo-Huber error is quadratic (the paper's c).
HUBER = 0.001

#: Steps of the sample grid.
FEW_STEPS = 4


class LcmLoraRecipe(LoraRecipe):
    """Distils guided sampling into a LoRA.

    Predictions of the end agree before and after a step of the guided teacher.

    The teacher is the backbone without the LoRA, so the file fits whatever is drawn with that backbone.

    Args:
        guidance: bounds of the teacher's guidance scale, drawn anew for every sample.
        solver_steps: steps in which the teacher goes from noise to picture.
        rest: see ``LoraRecipe``.
    """

    def __init__(
        self, source: Source, guidance: tuple[float, float] = (2.0, 3.0), solver_steps: int = 50, **rest: Any
    ) -> None:
        super().__init__(source, **rest)
        self.guidance = guidance
        self.stride = len(self.schedule) // solver_steps

    def errors(self, batch: Batch, t: Tensor, captions: Sequence[Any]) -> Tensor:
        """(B,) pseudo-Huber errors between the ends that are predicted before and after the teacher's step
        from timesteps (B,).
        """
        x_0 = self.latents(batch)
        eps = batch.randn(*x_0.shape[1:]).to(x_0)
        t = t // self.stride * self.stride + self.stride - 1
        before = (t - self.stride).clamp(min=0)
        x_t = self.schedule.add_noise(x_0, eps, t)
        text, empty = self.text_features(captions), self.text_features([""] * len(captions))
        low, high = self.guidance
        scale = (low + (high - low) * batch.rand()).to(x_t)
        with torch.no_grad():
            x_before = self.teach(x_t, t, before, text, empty, scale)
            target = self.end(x_before, before, text)
        difference = (self.end(x_t, t, text) - target).float()
        return ((difference.square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)

    def teach(
        self, x_t: Tensor, t: Tensor, before: Tensor, text: Tensor, empty: Tensor, scale: Tensor
    ) -> Tensor:
        """The samples at timesteps ``before`` after the teacher's guided DDIM step from (B, C, h, w) at
        ``t``.
        """
        self.unet.disable_adapters()
        try:
            negative, positive = self.unet(
                torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([empty, text])
            ).sample.chunk(2)
        finally:
            self.unet.enable_adapters()
        guided = negative + scale.view(-1, 1, 1, 1) * (positive - negative)
        return self.schedule.add_noise(*self.schedule.split(x_t, guided, t), before)

    def end(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The end of the path, as ``LCMScheduler`` makes it of the network's prediction at timesteps (B,)."""
        scaled = (TIMESTEP_SCALING * t.float()).view(-1, 1, 1, 1)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return skip * x_t + out * self.schedule.split(x_t, self.predict(x_t, t, text), t)[0]

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        scheduler = make_scheduler("LCM", self.schedule.prediction)
        pipe = stock_pipeline(self.vae, self.text_encoder, self.tokenizer, self.unet, scheduler)
        positive = self.encode_texts([self._captioned(prompt) for prompt in prompts])
        return draw_stock(pipe, positive, self.encode_texts([""] * len(prompts)), 1.0, seed, steps=FEW_STEPS)
