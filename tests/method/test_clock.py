"""Denoising steps are told by their timesteps, however often a pipeline calls the UNet in each."""

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from bdm.errors import UserError
from bdm.method.clock import StepClock, in_window
from bdm.models.noise_schedule import SD15_SCHEDULE


def ticks(clock, timesteps):
    return [clock.tick(t) for t in timesteps]


@pytest.mark.parametrize("steps", [lambda: 3, lambda: [700, 400, 100], lambda: torch.tensor([700, 400, 100])])
def test_views_of_a_panorama_are_one_step(steps):
    clock = StepClock(steps)
    assert ticks(clock, [700, 700, 400, 400, 100, 100]) == [0, 0, 1, 1, 2, 2]
    assert clock.total() == 3


@pytest.mark.parametrize("steps", [lambda: 3, lambda: [700, 400, 100]])
def test_a_round_that_begins_anew(steps):
    """Free-init draws the same steps several times."""
    assert ticks(StepClock(steps), [700, 400, 100] * 3) == [0, 1, 2] * 3


def test_timesteps_that_rise():
    """Inversion."""
    assert ticks(StepClock(lambda: 3), [100, 400, 700, 100, 400]) == [0, 1, 2, 0, 1]


def test_second_order_samplers():
    scheduler = HeunDiscreteScheduler(
        **{k: v for k, v in SD15_SCHEDULE.items() if k.startswith(("num", "beta"))}
    )
    scheduler.set_timesteps(4)
    clock = StepClock(lambda: scheduler.timesteps)
    assert len(scheduler.timesteps) == 7
    assert ticks(clock, scheduler.timesteps) == [0, 1, 1, 2, 2, 3, 3]
    assert clock.total() == 4


def test_a_call_that_begins_inside_the_schedule():
    scheduler = DDIMScheduler(**SD15_SCHEDULE)
    scheduler.set_timesteps(10)
    clock = StepClock(lambda: scheduler.timesteps[-4:])
    assert ticks(clock, scheduler.timesteps[6:]) == [0, 1, 2, 3]
    assert clock.total() == 4


def test_the_pipelines_own_timesteps_are_not_read_off_the_device(monkeypatch):
    """On a GPU that would wait for everything before."""
    timesteps = torch.tensor([900, 600, 300, 0])
    clock = StepClock(lambda: timesteps[-3:])
    clock.tick(timesteps[1])
    monkeypatch.setattr(torch.Tensor, "__float__", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("read"))
    assert clock.tick(timesteps[2]) == 1
    assert clock.tick(timesteps[3]) == 2


def test_batches_of_equal_timesteps():
    assert ticks(StepClock(None), [torch.full((4,), 9), torch.full((4,), 8.5), 8]) == [0, 1, 2]


def test_windows():
    acting = [in_window(i, lambda: 10, 0.25, 0.8) for i in range(10)]
    assert acting == [False, False, False, True, True, True, True, True, False, False]
    assert in_window(5, lambda: pytest.fail("asked"), 0.0, 1.0)
    with pytest.raises(UserError, match="a window needs the number of steps"):
        in_window(0, StepClock(None).total, 0.5, 1.0)
