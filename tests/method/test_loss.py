"""The loss reads as the paper's equation, and is it."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bdm.method.loss import DenoisingLoss
from bdm.models.noise_schedule import SD15_SCHEDULE, NoiseSchedule

WEIGHTS = {
    "none": lambda snr: 1.0,
    "min_snr": lambda snr: min(snr, 5) / snr,
    "velocity": lambda snr: 1 + 1 / snr,
}


@dataclass
class Drawn:
    """What is drawn, in the order in which it is asked for."""

    values: list[Tensor]

    def randn(self, *shape):
        return self.values.pop(0)

    def rand(self):
        return self.values.pop(0)


def make(prediction="epsilon", **options):
    return DenoisingLoss(NoiseSchedule(prediction), **options)


def diffusers_schedule(prediction):
    return DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": prediction})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_it_is_the_weighted_error_of_what_diffusers_schedule_says(prediction, weight, offset):
    """Noisy latents and target from diffusers, weights by their formulas, the mean over each sample."""
    x_0, eps, further = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.randn(5, 4, 1, 1)
    t = torch.tensor([0, 100, 500, 900, 999])
    seen = []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return 0.3 * x_t - 0.1

    loss = make(prediction, weight=weight, offset_noise=offset)(denoise, x_0, t, Drawn([eps, further]))
    scheduler = diffusers_schedule(prediction)
    noise = eps + offset * further
    x_t = scheduler.add_noise(x_0, noise, t)
    ((told, when),) = seen
    torch.testing.assert_close(told, x_t)
    assert torch.equal(when, t)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(x_0, noise, t)
    errors = (0.3 * x_t - 0.1 - target).square().mean((1, 2, 3))
    alpha_bar = scheduler.alphas_cumprod[t]
    weights = torch.tensor([WEIGHTS[weight](snr) for snr in (alpha_bar / (1 - alpha_bar)).tolist()])
    if prediction == "v_prediction" and weight != "none":
        weights = weights * alpha_bar  # errors of the velocity are those of the noise divided by alpha
    torch.testing.assert_close(loss, weights * errors, rtol=3e-5, atol=1e-6)


def test_errors_are_worked_out_in_float32():
    x_0 = torch.full((1, 4, 8, 8), 200.0, dtype=torch.float16)
    loss = make()(lambda x_t, t: 300 + x_t, x_0, torch.tensor([0]), Drawn([torch.zeros(1, 4, 8, 8)]))
    assert loss.dtype == torch.float32
    assert 2.4e5 < loss.item() < 2.6e5, "in half precision it would be infinite"


def test_velocity_errors_of_a_denoiser_that_knows_the_variance_alone_are_equal():
    """The best linear guess of the noise in x_t = alpha x_0 + sigma eps, for x_0 of unit variance, is sigma
    x_t.
    """
    loss = make(weight="velocity")
    t = torch.tensor([50, 300, 600, 950])
    x_0, eps = torch.randn(2, 4, 4, 224, 224)
    weighted = loss(lambda x_t, t: loss.schedule.alpha_sigma(t)[1] * x_t, x_0, t, Drawn([eps]))
    torch.testing.assert_close(weighted, torch.ones(4), rtol=0.02, atol=0)


def test_timesteps_have_their_density():
    u = (torch.arange(400_000) + 0.5) / 400_000
    assert torch.equal(make().draw_timesteps(Drawn([u])), (u * 1000).long())
    drawn = make(density="high_noise").draw_timesteps(Drawn([u]))
    alpha_bar = diffusers_schedule("epsilon").alphas_cumprod.double()
    density = ((1 - alpha_bar) / alpha_bar).sqrt()
    counts = torch.bincount(drawn, minlength=1000).double()
    torch.testing.assert_close(counts / len(u), density / density.sum(), rtol=0, atol=2 / len(u))
    edges = make().draw_timesteps(Drawn([torch.tensor([0.0, 1 - 2**-24])]))
    assert edges.tolist() == [0, 999]
