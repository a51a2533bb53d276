"""How noise is added to latents, step by step, and what of it a network may be asked for."""

from __future__ import annotations

from typing import Any, Literal

from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..formats.noise import SD15_NOISE

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
    """SD1.5's variance-preserving schedule (DDPM, arXiv 2006.11239, equation 4).

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

    def alpha_sigma(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at timesteps (B,), to be multiplied by samples of ``ndim`` dimensions."""
        alpha_bar = self.alphas_cumprod[t].view(-1, *[1] * (ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for (B, ...) samples at timesteps (B,)."""
        alpha_t, sigma_t = self.alpha_sigma(t, x_0.ndim)
        return alpha_t * x_0 + sigma_t * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say of (B, ...) samples at timesteps (B,): the noise, or the velocity."""
        if self.prediction == "epsilon":
            return eps
        alpha_t, sigma_t = self.alpha_sigma(t, x_0.ndim)
        return alpha_t * eps - sigma_t * x_0

    def split(self, x_t: Tensor, predicted: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) that (B, ...) samples at timesteps (B,) are made of, if the prediction is right."""
        alpha_t, sigma_t = self.alpha_sigma(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - sigma_t * predicted) / alpha_t, predicted
        return alpha_t * x_t - sigma_t * predicted, sigma_t * x_t + alpha_t * predicted

    def snr(self, t: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio alpha_t^2 / sigma_t^2."""
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar / (1 - alpha_bar)
