import math

import pytest
import torch
from diffusers import DDIMScheduler

from bdm.models.noise_schedule import SD15_SCHEDULE, NoiseSchedule


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
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(3, 1, 1, 1))
    torch.testing.assert_close(schedule.snr(t), (alpha / sigma).square().flatten())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_right_prediction_splits_samples_into_what_they_are_made_of(prediction):
    schedule = NoiseSchedule(prediction)
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 900])
    found = schedule.split(schedule.add_noise(x_0, eps, t), schedule.target(x_0, eps, t), t)
    torch.testing.assert_close(found, (x_0, eps), rtol=1e-4, atol=1e-4)


def test_velocity_is_that_of_diffusers():
    schedule, scheduler = NoiseSchedule("v_prediction"), DDIMScheduler(**SD15_SCHEDULE)
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.target(x_0, eps, t), scheduler.get_velocity(x_0, eps, t))
    assert torch.equal(NoiseSchedule().target(x_0, eps, t), eps)
