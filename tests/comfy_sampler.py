"""A sampler as ComfyUI's are: noise by sigmas, positive and negative in one batch, residuals by a control."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import EulerDiscreteScheduler

from bdm.models.noise_schedule import SD15_SCHEDULE

STEPS, GUIDANCE = 4, 3.0


def make_scheduler() -> EulerDiscreteScheduler:
    """One whose steps the sampler below takes, too."""
    scheduler = EulerDiscreteScheduler.from_config(SD15_SCHEDULE, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(STEPS)
    return scheduler


class Sampling:
    """Noise of SD1.5's schedule, by sigmas."""

    def __init__(self) -> None:
        products = make_scheduler().alphas_cumprod
        self.sigmas = ((1 - products) / products) ** 0.5

    def timestep(self, sigma):
        return (self.sigmas[None] - sigma[:, None]).abs().argmin(dim=1)

    def calculate_input(self, sigma, x):
        return x / (sigma[:, None, None, None] ** 2 + 1) ** 0.5

    def percent_to_sigma(self, percent):
        if not 0 < percent < 1:
            return float("inf") if percent <= 0 else 0.0
        return float(self.sigmas[int((1 - percent) * 999)])


def make_model(unet):
    """What a sampler knows of a model."""
    first, *_ = channels = unet.config["block_out_channels"]
    factors = [each // first for each in channels]
    config = SimpleNamespace(unet_config={"model_channels": first, "channel_mult": factors})
    return SimpleNamespace(model_config=config, model_sampling=Sampling(), unet=unet)


def draw(model, positive, negative, noise):
    """Latents after all steps, by Euler's method."""
    sigmas = make_scheduler().sigmas
    control = positive[0][1].get("control")
    if control is not None:
        assert control is negative[0][1]["control"]
        control.pre_run(model, model.model_sampling.percent_to_sigma)
    x = noise * (sigmas[0] ** 2 + 1) ** 0.5
    for sigma, following in zip(sigmas, sigmas[1:]):
        wanted, unwanted = denoising(model, [positive[0], negative[0]], x, sigma, control).chunk(2)
        x = x + (unwanted + GUIDANCE * (wanted - unwanted)) * (following - sigma)
    if control is not None:
        control.cleanup()
    return x


def batched(conditionings, batch):
    """What a control is handed of conditionings that are drawn in one batch."""
    own = [said.get("model_conds", {}) for _, said in conditionings]
    rows = {name: [each[name].process_cond(batch) for each in own] for name in own[0]}
    cond = {name: first.concat(others) for name, (first, *others) in rows.items()}
    return {"c_crossattn": torch.cat([text for text, _ in conditionings]), **cond}


def denoising(model, conditionings, x, sigma, control):
    """What the UNet says of one step's batch."""
    x, t = torch.cat([x] * len(conditionings)), sigma.expand(len(conditionings) * len(x))
    cond, residuals = batched(conditionings, len(x) // len(conditionings)), {}
    if control is not None:
        given = control.get_control(x, t, cond, len(conditionings), {})
        if given is not None:
            residuals = {
                "down_block_additional_residuals": tuple(given["output"]),
                "mid_block_additional_residual": given["middle"][0],
            }
    sampling = model.model_sampling
    sample, timesteps = sampling.calculate_input(t, x), sampling.timestep(t)
    return model.unet(sample, timesteps, cond["c_crossattn"], **residuals).sample
