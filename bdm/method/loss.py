"""The loss of a Bridge Diffusion Model (arXiv 2309.00952, equation 3), a line a term.

    L = E [ w(t) | target - f(x_t, t, c_en, c_native) |^2 ]

With target = eps and w = 1 it is the paper's, which is latent diffusion's (DDPM, arXiv 2006.11239, equation
14). The network ``f`` is told its two texts by whoever calls: here it is a function of (x_t, t).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..models.noise_schedule import NoiseSchedule

LossWeight = Literal["none", "min_snr", "velocity"]
TimestepDensity = Literal["uniform", "high_noise"]

#: (B, C, h, w) latents at timesteps (B,) -> the prediction of what the schedule says, of the same shape.
Denoise = Callable[[Tensor, Tensor], Tensor]


class Draws(Protocol):
    """Where randomness comes from: B samples, each of which has its own."""

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal float32."""
        ...

    def rand(self) -> Tensor:
        """(B,) uniform in [0, 1)."""
        ...


class DenoisingLoss(nn.Module):
    """The weighted error of a denoiser.

    Args:
        schedule: how noise is added, and what the denoiser is asked for.
        density: of the timesteps: ``"uniform"``, or ``"high_noise"``: in proportion to 1 / sqrt(SNR), because
            the prompt decides what is drawn where noise is high.
        weight: of the squared error, by timestep: ``"none"`` is 1. ``"min_snr"``: min(SNR, 5) / SNR for the
            noise (arXiv 2303.09556). ``"velocity"``: 1 + 1 / SNR for the noise, which makes it the error of
            the velocity. For latents of unit variance that is the inverse of the error of a denoiser that
            knows nothing else (EDM's weight, arXiv 2206.00364), so errors are of about one size at all
            timesteps; unweighted ones are thirty times smaller where noise is high and the text decides, and
            drown in the gradients of the others.
        offset_noise: standard deviation of a further noise that is one number for each channel, so that the
            mean colour of a picture, which the schedule hardly destroys, is learned too.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        density: TimestepDensity = "uniform",
        weight: LossWeight = "none",
        offset_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.density: TimestepDensity = density
        self.weight_kind: LossWeight = weight
        self.offset_noise = offset_noise

    def forward(self, denoise: Denoise, x_0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """(B,) weighted errors for (B, C, h, w) latents at timesteps (B,)."""
        return self.weight(t) * self.error(denoise, x_0, t, draws)

    def error(self, denoise: Denoise, x_0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """(B,) mean squared errors, in float32."""
        eps = self.noise(x_0, draws)
        x_t = self.schedule.add_noise(x_0, eps, t)
        target = self.target(denoise, x_0, eps, x_t, t)
        return (denoise(x_t, t).float() - target.float()).square().flatten(1).mean(1)

    def target(self, denoise: Denoise, x_0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, C, h, w) what the denoiser is to predict: the noise or the velocity, whatever it is told."""
        return self.schedule.target(x_0, eps, t)

    def noise(self, x_0: Tensor, draws: Draws) -> Tensor:
        """(B, C, h, w) noise for latents of that shape."""
        eps = draws.randn(*x_0.shape[1:]).to(x_0)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.randn(x_0.shape[1], 1, 1).to(x_0)
        return eps

    def weight(self, t: Tensor) -> Tensor:
        """(B,) weights of the squared errors at timesteps (B,)."""
        snr = self.schedule.snr(t)
        if self.weight_kind == "none":
            return torch.ones_like(snr)
        of_noise = snr.clamp(max=5.0) / snr if self.weight_kind == "min_snr" else 1 + 1 / snr
        if self.schedule.prediction == "epsilon":
            return of_noise
        # An error of the velocity is one of the noise divided by alpha_t, hence alpha_t^2 = SNR / (SNR + 1).
        return of_noise * self.schedule.alphas_cumprod[t]

    def draw_timesteps(self, draws: Draws) -> Tensor:
        """(B,) timesteps of the density, by inversion of its distribution function."""
        every = torch.arange(len(self.schedule), device=self.schedule.alphas_cumprod.device)
        snr = self.schedule.snr(every)
        density = torch.ones_like(snr) if self.density == "uniform" else snr.rsqrt()
        cumulative = density.double().cumsum(0)
        drawn = draws.rand().to(cumulative) * cumulative[-1]
        return torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(self.schedule) - 1)
