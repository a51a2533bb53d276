"""What an unfinished picture looks like, roughly and at once.

A VAE's colours are nearly a linear function of its latents, so a matrix that is fitted to it once shows a
step's latents without decoding them. What is shown is what the newest step expects of the picture without its
noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..models.backbone import encode_moments

#: Pictures of soft colours that are encoded for the fit, their side, and how many colours a side has.
_SAMPLES, _SIDE, _COLOURS = 32, 64, 4


@dataclass(frozen=True)
class Colours:
    """A VAE's colours as a linear function of its latents.

    Attributes:
        matrix: (C + 1, 3): what each channel of scaled latents adds to red, green and blue in [0, 1]; last
            what is there without any.
        factor: pixels of a latent's side.
    """

    matrix: Tensor
    factor: int

    @classmethod
    @torch.no_grad()
    def of(cls, vae: Any) -> Colours:
        """The best fit to pictures of soft colours, which the VAE encodes."""
        few = torch.rand(_SAMPLES, 3, _COLOURS, _COLOURS, generator=torch.Generator().manual_seed(0))
        pictures = interpolate(few, (_SIDE, _SIDE), mode="bilinear")
        mean, _ = encode_moments(vae, pictures.to(vae.device, vae.dtype) * 2 - 1).float().cpu().chunk(2, 1)
        latents = _pixels(mean * vae.config["scaling_factor"])
        known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
        factor = _SIDE // mean.shape[-1]
        return cls(torch.linalg.lstsq(known, _pixels(avg_pool2d(pictures, factor))).solution, factor)

    @torch.no_grad()
    def show(self, latents: Tensor) -> Image.Image:
        """A picture for (1, C, h, w) scaled latents."""
        one = latents[0].detach().float().cpu()
        colours = torch.tensordot(self.matrix[:-1].T, one, 1) + self.matrix[-1][:, None, None]
        large = interpolate(colours[None], scale_factor=self.factor, mode="bilinear")[0]
        pixels = (large.nan_to_num().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
        return Image.fromarray(pixels.numpy())


def _pixels(maps: Tensor) -> Tensor:
    """(N, C, h, w) as (N h w, C)."""
    return maps.movedim(1, -1).flatten(0, 2)


class Expected:
    """What a drawing's newest step expects of its latents without their noise.

    Args:
        scheduler: of the drawing alone; its steps are looked at.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._seen: tuple[Tensor, Any, Tensor] | None = None
        step = scheduler.step

        @functools.wraps(step)
        def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._seen = (model_output, timestep, sample)
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = watched

    def newest(self, latents: Tensor) -> Callable[[], Tensor]:
        """Gives what the newest step expects; ``latents`` as they are where it says nothing."""
        seen = self._seen
        return lambda: latents if seen is None else self._without_noise(*seen)

    def _without_noise(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """See DDIM (arXiv 2010.02502), equation 12, and progressive distillation (arXiv 2202.00512)."""
        kept = self._kept(float(timestep))
        signal, noise = kept**0.5, (1.0 - kept) ** 0.5
        if float(self._scheduler.init_noise_sigma) > 1.5:  # latents that grow with their noise
            sample = sample * signal
        kind = self._scheduler.config.get("prediction_type", "epsilon")
        if kind == "epsilon":
            return (sample - noise * output) / signal
        return signal * sample - noise * output if kind == "v_prediction" else output

    def _kept(self, timestep: float) -> float:
        """The share of a picture that noise leaves at a timestep."""
        table = self._scheduler.alphas_cumprod
        return max(float(table[min(max(round(timestep), 0), len(table) - 1)]), 1e-4)
