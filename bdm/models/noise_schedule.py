"""The noise schedule and the denoising loss (DDPM, arXiv 2006.11239, equation 14)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..formats.noise import SD15_NOISE

LossWeight = Literal["none", "min_snr", "velocity"]
Timesteps = Literal["uniform", "high_noise"]
Prediction = Literal["epsilon", "v_prediction"]

#: The scheduler configuration of SD1.5 (its scheduler_config.json).
SD15_SCHEDULE: dict[str, Any] = dict(
    **{name: getattr(SD15_NOISE, name) for name in
       ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")},
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip


class NoiseSchedule(nn.Module):
    """SD1.5's variance-preserving schedule.

    ``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``.

    Args:
        prediction: what the network is asked for: the noise, or the velocity (arXiv 2202.00512).
    """

    alphas_cumprod: Tensor

    def __init__(self, prediction: Prediction = "epsilon") -> None:
        super().__init__()
        self.prediction: Prediction = prediction
        scheduler = DDPMScheduler(
            **{k: v for k, v in SD15_SCHEDULE.items() if k not in ("set_alpha_to_one", "steps_offset")}
        )
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for (B, ...) samples at timesteps (B,)."""
        alpha_bar = self.alphas_cumprod[t].view(-1, *[1] * (x_0.ndim - 1))
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say of (B, ...) samples at timesteps (B,).

        ``eps``, or ``v = alpha_t eps - sigma_t x_0``.
        """
        if self.prediction == "epsilon":
            return eps
        alpha_bar = self.alphas_cumprod[t].view(-1, *[1] * (x_0.ndim - 1))
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    def split(self, x_t: Tensor, predicted: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) that (B, ...) samples at timesteps (B,) are made of, if the network's prediction is
        right.
        """
        alpha_bar = self.alphas_cumprod[t].view(-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / alpha, predicted
        return alpha * x_t - sigma * predicted, sigma * x_t + alpha * predicted

    def snr(self, t: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio alpha_t^2 / sigma_t^2."""
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar / (1 - alpha_bar)

    def weight(self, t: Tensor, kind: LossWeight) -> Tensor:
        """(B,) weights of the squared error.

        ``min_snr``: min(SNR, 5) / SNR for the noise (arXiv 2303.09556). ``velocity``: 1 + 1 / SNR for the
        noise, which makes it the error of the velocity. For latents of unit variance that is the inverse of
        the error of a denoiser that knows nothing else (EDM's weight, arXiv 2206.00364), so errors are of
        about one size at all timesteps; unweighted ones are thirty times smaller where noise is high and the
        text decides, and drown in the gradients of the others.

        An error of the velocity is one of the noise divided by alpha_t, hence the factor alpha_t^2 = SNR /
        (SNR + 1) where the network predicts that.
        """
        snr = self.snr(t)
        if kind == "none":
            return torch.ones_like(snr)
        weight = snr.clamp(max=5.0) / snr if kind == "min_snr" else 1 + 1 / snr
        return weight * self.alphas_cumprod[t] if self.prediction == "v_prediction" else weight

    def draw_timesteps(self, uniform: Tensor, kind: Timesteps) -> Tensor:
        """Timesteps of a density, by inversion of its distribution function.

        Args:
            uniform: (B,) in [0, 1).
            kind: ``"uniform"``, or ``"high_noise"``: in proportion to 1 / sqrt(SNR), at most 30, because the
                prompt decides what is drawn where noise is high.
        """
        snr = self.snr(torch.arange(len(self), device=uniform.device))
        density = torch.ones_like(snr) if kind == "uniform" else snr.rsqrt().clamp(max=30.0)
        cumulative = density.double().cumsum(0)
        return torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True).clamp(
            max=len(self) - 1
        )


def denoising_error(predicted: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of each sample, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
