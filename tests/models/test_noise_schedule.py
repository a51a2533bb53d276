import math

import pytest
import torch
from diffusers import DDIMScheduler

from bdm.models.noise_schedule import SD15_SCHEDULE, NoiseSchedule, denoising_error


def test_schedule_is_sd15s():
    schedule = NoiseSchedule()
    betas = [
        (math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)
    ]
    expected = torch.tensor(betas, dtype=torch.float64).neg().add(1).cumprod(0)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    scheduler = DDIMScheduler(**SD15_SCHEDULE)
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x_0, eps, t), scheduler.add_noise(x_0, eps, t))


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("none", lambda snr: 1.0),
        ("min_snr", lambda snr: min(snr, 5) / snr),
        ("velocity", lambda snr: 1 + 1 / snr),
    ],
)
def test_weights(kind, formula):
    schedule = NoiseSchedule()
    t = torch.arange(0, 1000, 111)
    snr = (schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])).tolist()
    torch.testing.assert_close(
        schedule.weight(t, kind), torch.tensor([formula(s) for s in snr]), rtol=1e-4, atol=1e-6
    )


def test_velocity_is_that_of_diffusers_and_weights_are_those_of_the_same_error():
    """The error of a velocity times alpha_t is the error of the noise it implies, so alpha_t^2 joins the
    weights.
    """
    schedule, scheduler = NoiseSchedule("v_prediction"), DDIMScheduler(**SD15_SCHEDULE)
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.target(x_0, eps, t), scheduler.get_velocity(x_0, eps, t))
    assert torch.equal(NoiseSchedule().target(x_0, eps, t), eps)
    alpha_bar = schedule.alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(schedule.weight(t, "min_snr"), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(schedule.weight(t, "none"), torch.ones(3))
    torch.testing.assert_close(schedule.weight(t, "velocity"), torch.ones(3))
    for kind in ("min_snr", "velocity"):
        torch.testing.assert_close(schedule.weight(t, kind), NoiseSchedule().weight(t, kind) * alpha_bar)


def test_drawn_timesteps_have_their_density():
    schedule = NoiseSchedule()
    u = (torch.arange(400_000) + 0.5) / 400_000
    assert torch.equal(schedule.draw_timesteps(u, "uniform"), (u * 1000).long())
    drawn = schedule.draw_timesteps(u, "high_noise")
    density = schedule.snr(torch.arange(1000)).double().rsqrt().clamp(max=30)
    counts = torch.bincount(drawn, minlength=1000).double()
    torch.testing.assert_close(counts / len(u), density / density.sum(), rtol=0, atol=1 / len(u))


def test_velocity_errors_of_a_denoiser_that_knows_the_variance_alone_are_equal():
    """The best linear guess of the noise in x_t = alpha x_0 + sigma eps, for x_0 of unit variance, is sigma
    x_t.
    """
    schedule = NoiseSchedule()
    t = torch.tensor([50, 300, 600, 950])
    x_0, eps = torch.randn(2, 4, 200_000)
    x_t = schedule.add_noise(x_0, eps, t)
    sigma = (1 - schedule.alphas_cumprod[t]).sqrt()[:, None]
    weighted = schedule.weight(t, "velocity") * denoising_error(sigma * x_t, eps)
    torch.testing.assert_close(weighted, torch.ones(4), rtol=0.02, atol=0)


def test_error_is_a_mean_per_sample():
    a, b = torch.zeros(2, 4, 8, 8), torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), 2.0)])
    assert denoising_error(a, b).tolist() == [0.0, 4.0]
