"""Samplers by every name, and the levels of noise at which they stop."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from bdm.errors import UserError
from bdm.extras import is_installed
from bdm.formats.noise import Noise
from bdm.models.beta_distribution import beta_quantiles
from bdm.models.restart import restart_levels
from bdm.models.sampler_names import NEAREST, SAMPLERS, SamplerName
from bdm.models.samplers import make_scheduler, other_sampler, scheduler_noise
from bdm.models.scheduled import restore
from bdm.models.sigma_schedules import SCHEDULES

#: SD1.5's levels of noise, written out (scaled_linear betas from 0.00085 to 0.012).
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TRAINED = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
LOW, HIGH = 0.0291672, 14.6146
HERE = [title for title in SAMPLERS if title != "LMS" or is_installed("scipy")]
FOLLOWING = [title for title in HERE if SAMPLERS[title].scheduled]


def between(t):
    """The level at a timestep between two trained ones."""
    low = min(int(t), 998)
    share = t - low
    return math.exp((1 - share) * math.log(TRAINED[low]) + share * math.log(TRAINED[low + 1]))


def expected(name, n):
    """Each schedule's published formula, level by level."""
    every = range(n)
    last = max(n - 1, 1)
    if name == "Karras":
        return [(HIGH ** (1 / 7) + i / last * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7 for i in every]
    if name in ("Exponential", "Polyexponential"):
        return [math.exp((1 - i / last) * math.log(HIGH) + i / last * math.log(LOW)) for i in every]
    if name in ("Uniform", "Normal"):
        return [between(999 * (1 - i / last)) for i in every]
    if name == "SGM Uniform":
        return [between(999 * (1 - i / n)) for i in every]
    if name == "Simple":
        return [TRAINED[-(1 + int(i * 1000 / n))] for i in every]
    if name == "DDIM":
        return [TRAINED[1 + 1000 // n * i] for i in every][::-1]
    if name == "KL Optimal":
        return [math.tan(i / n * math.atan(LOW) + (1 - i / n) * math.atan(HIGH)) for i in every]
    if name == "Beta":
        return [LOW + share * (HIGH - LOW) for share in beta_by_counting([1 - i / last for i in every])]
    assert name == "Align Your Steps"
    table = np.log([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029])
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 11), table)).tolist()


def beta_by_counting(shares):
    """Quantiles of the beta distribution (0.6, 0.6) by adding up its density.

    With x = sin(u)^2 the density is smooth enough at both ends to be summed.
    """
    u = np.linspace(0, math.pi / 2, 400_001)
    with np.errstate(divide="ignore"):
        density = 2 * np.sin(u) ** 0.2 * np.cos(u) ** 0.2
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sin(np.interp(shares, below / below[-1], u)) ** 2


def levels(scheduler, n):
    """Where each step of a scheduler begins, each once."""
    scheduler.set_timesteps(n)
    sigmas = scheduler.sigmas[:-1]
    return sigmas if scheduler.order == 1 else torch.cat([sigmas[:1], sigmas[1::2]])[:n]


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_the_published_formulas(name):
    for title in FOLLOWING:
        for n in (2, 13):
            found = levels(make_scheduler(title, schedule=name), n)
            np.testing.assert_allclose(found, expected(name, n), rtol=1e-4, err_msg=f"{title} {n}")
            scheduler = make_scheduler(f"{title} {name}")
            torch.testing.assert_close(levels(scheduler, n), found, rtol=0, atol=0)
            assert len(scheduler.timesteps) == (n if scheduler.order == 1 else 2 * n - 1)
            assert scheduler.timesteps.diff().max() <= 0.5, "time goes down, but for what diffusers rounds"


def test_steps_end_without_noise_or_where_the_schedule_says():
    for title in FOLLOWING:
        if title in ("DEIS", "SA-Solver"):  # whose formulas do not reach 0; diffusers ends at the last level
            continue
        scheduler = make_scheduler(title, schedule="Karras")
        scheduler.set_timesteps(5)
        assert scheduler.sigmas[-1] == 0, title
    optimal = make_scheduler("Euler", schedule="KL Optimal")
    optimal.set_timesteps(5)
    assert optimal.sigmas[-1] == pytest.approx(LOW, rel=1e-4)


def test_diffusers_own_schedules_are_the_same():
    for flag, name in (("use_karras_sigmas", "Karras"), ("use_exponential_sigmas", "Exponential")):
        for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler):
            ours = make_scheduler(kind.__name__, schedule=name)
            assert ours.config[flag]
            theirs = kind.from_config({k: v for k, v in ours.config.items() if k != "sigma_schedule"})
            theirs.set_timesteps(12)
            ours.set_timesteps(12)
            torch.testing.assert_close(ours.sigmas, theirs.sigmas)
            torch.testing.assert_close(ours.timesteps, theirs.timesteps, atol=1.0, rtol=0)


def test_quantiles_give_their_shares():
    assert beta_quantiles(np.array([0.0, 0.5, 1.0]), 0.6, 0.6).tolist() == pytest.approx([0, 0.5, 1])
    # Of (a, 1) the share below x is x^a.
    np.testing.assert_allclose(beta_quantiles(np.array([0.2, 0.9]), 3, 1), [0.2 ** (1 / 3), 0.9 ** (1 / 3)])


@pytest.mark.parametrize("title", HERE)
def test_three_spellings_are_one(title):
    said = SAMPLERS[title]
    spelled = {
        SamplerName.read(name) for name in (title, title.lower(), said.short, f"k_{said.short}".upper())
    }
    assert spelled == {SamplerName(title)}
    assert type(make_scheduler(title)).__name__ == said.kind
    by_class = SamplerName.read(said.kind)
    assert SAMPLERS[by_class.sampler].kind == said.kind
    if said.scheduled:
        for name in SCHEDULES:
            short = f"{said.short}_{name.lower().replace(' ', '_')}"
            read = {
                SamplerName.read(title, name),
                SamplerName.read(f"{title} {name}"),
                SamplerName.read(short),
            }
            assert read == {SamplerName(title, name)}


def test_names_out_and_back():
    for title in HERE:
        for name in (None, *(SCHEDULES if SAMPLERS[title].scheduled else ())):
            scheduler = make_scheduler(title, schedule=name)
            found = SamplerName.of(scheduler)
            assert found == SamplerName(title, name)
            again = make_scheduler(str(found))
            assert type(again) is type(scheduler)
            assert again.config == scheduler.config
    assert SamplerName.of(EulerDiscreteScheduler(use_karras_sigmas=True)) == SamplerName("Euler", "Karras")
    assert SamplerName.of(DPMSolverMultistepScheduler(use_lu_lambdas=True)) is None


def test_automatic_is_what_a1111_takes():
    assert SamplerName.read("DPM++ 2M", "Automatic") == SamplerName("DPM++ 2M", "Karras")
    assert SamplerName.read("DPM++ 3M SDE", "automatic") == SamplerName("DPM++ 3M SDE", "Exponential")
    assert SamplerName.read("Euler a", "Automatic") == SamplerName("Euler a")
    assert SamplerName.read("DDIM", "Automatic") == SamplerName("DDIM")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Eular",), "unknown sampler 'Eular'; known are DPM.*did you mean Euler"),
        (("Euler 甲",), "unknown sampler"),
        (("",), "unknown sampler"),
        (("Euler", "Karas"), "unknown schedule 'Karas'.*did you mean Karras"),
        (("DDIM Karras",), "DDIM has no karras.*such as Euler"),
        (("Restart", "Beta"), "Restart has no beta"),
        (("Euler Karras", "Beta"), "differ"),
        (("DPM adaptive",), "DPM adaptive is none of diffusers'; the nearest that is one is DPM"),
        (("k_dpm_fast",), "unknown sampler|none of diffusers"),
        (("DPM++ 2S a Karras",), "DPM.. 2S a is none of diffusers'; the nearest that is one is DPM.. SDE"),
    ],
)
def test_the_rest_is_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerName.read(*arguments)


def test_what_is_nearest_is_there():
    assert set(NEAREST.values()) <= set(SAMPLERS)
    for title in NEAREST:
        with pytest.raises(UserError, match="none of diffusers"):
            make_scheduler(title)


def test_a_table_for_one_noise_is_refused_for_another():
    make_scheduler("Euler", schedule="Align Your Steps", noise=Noise("v_prediction"))
    with pytest.raises(UserError, match="table for SD1.5's noise.*beta_end 0.02; use Karras"):
        make_scheduler("Euler", schedule="Align Your Steps", noise=Noise(beta_end=0.02))


@pytest.mark.parametrize("title", [title for title in HERE if title not in ("TCD", "LCM", "DDPM")])
@pytest.mark.parametrize("name", [None, "Karras", "SGM Uniform", "KL Optimal"])
def test_with_a_perfect_model_every_sampler_comes_home(title, name):
    """A model that knows the picture is led to it by any sampler on any levels of noise."""
    if name is not None and not SAMPLERS[title].scheduled:
        name = None
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    scheduler = make_scheduler(title, schedule=name)
    scheduler.set_timesteps(24)
    noise = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 4, 4, generator=noise) * scheduler.init_noise_sigma
    takes = {"generator": noise} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t)
        # The timesteps of some classes are whole numbers beside levels that lie between them.
        alpha_bar = ALPHA_BAR[int(t)]
        if given is not latents:
            alpha_bar = float((given / latents).mean() ** 2)
        elif hasattr(scheduler, "sigmas"):
            alpha_bar = 1 / (1 + float(scheduler.sigmas[scheduler.step_index or 0]) ** 2)
        eps = (given - alpha_bar**0.5 * picture) / (1 - alpha_bar) ** 0.5
        latents = scheduler.step(eps, t, latents, **takes).prev_sample
    assert (latents - picture).abs().max() < 0.2, (title, name)


def test_restart_goes_the_numbers_of_steps_that_were_asked_for():
    for n in (5, 19, 20, 30, 36, 50):
        steps = restart_levels(n, TRAINED)
        assert len(steps) == n
        assert steps[-1][1] == 0
        ups = [(a, b) for (_, a), (b, _) in zip(steps, steps[1:], strict=False) if b > a]
        assert len(ups) == (0 if n < 20 else 1 if n < 36 else 2)
        assert all(0.05 < a < 0.2 and 1 < b < 4 for a, b in ups)


def test_restart_puts_back_as_much_noise_as_it_says():
    scheduler = make_scheduler("Restart")
    scheduler.set_timesteps(20)
    latents = torch.zeros(1, 4, 64, 64)
    spread = []
    for t in scheduler.timesteps:
        # A model that finds nothing but the picture itself moves nothing.
        latents = scheduler.step(
            torch.zeros_like(latents), t, latents, torch.Generator().manual_seed(0)
        ).prev_sample
        spread.append(float(latents.std()))
    (before, after), *_ = [
        (float(a), float(b)) for a, b in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False) if b > a
    ]
    assert spread[-1] == pytest.approx((after**2 - before**2) ** 0.5, rel=0.03)


def test_a_schedule_outlives_copies_files_and_other_samplers(tmp_path):
    for title, name in (("Euler a", "Beta"), ("DPM++ 2M", "SGM Uniform"), ("Restart", None)):
        scheduler = make_scheduler(title, schedule=name)
        scheduler.save_pretrained(tmp_path)
        kind = scheduler.made_of
        assert kind.__module__.startswith("diffusers.")
        read = restore(kind.from_config(kind.load_config(tmp_path)))
        remade = type(scheduler).from_config(scheduler.config)
        for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), read, remade):
            assert SamplerName.of(other) == SamplerName(title, name)
            scheduler.set_timesteps(21)
            other.set_timesteps(21)
            assert torch.equal(other.sigmas, scheduler.sigmas)
        assert type(other_sampler("DDIM", scheduler)) is DDIMScheduler


def test_what_the_model_expects_is_kept():
    for title in FOLLOWING:
        scheduler = make_scheduler(title, noise=Noise("v_prediction", beta_end=0.02), schedule="Karras")
        assert scheduler_noise(scheduler) == Noise("v_prediction", beta_end=0.02)


def test_plain_ones_are_diffusers_own_classes():
    official = make_scheduler("DPM++ 2M")
    assert type(official) is DPMSolverMultistepScheduler
    assert official.config.final_sigmas_type == "sigma_min"
    assert restore(official) is official
