"""Samplers by the names people know.

``DPM++ 2M Karras``, ``dpmpp_2m``, a sampler with a schedule, or a diffusers class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers

from ..errors import UserError
from ..extras import require_packages
from ..formats.noise import SD15_NOISE, Noise
from .noise_schedule import SD15_SCHEDULE
from .sampler_names import SAMPLERS, SamplerName
from .scheduled import RESTART, SETTING, scheduled

__all__ = ["SAMPLERS", "SamplerName", "make_scheduler", "other_sampler", "scheduler_noise"]

#: Schedules that diffusers has a setting for, under which it is told of ours too.
_FLAGS = {"Exponential": "use_exponential_sigmas", "Polyexponential": "use_exponential_sigmas"}


def make_scheduler(
    name: str, prediction: str | None = None, noise: Noise = SD15_NOISE, schedule: str | None = None
) -> Any:
    """A diffusers scheduler, with SD1.5's noise schedule unless another is given.

    Args:
        name: a sampler in any spelling, with a schedule in it where one is wanted: ``DPM++ 2M``,
            ``dpmpp_2m``, ``DPM++ 2M Karras``, ``dpmpp_2m_karras``, ``DPMSolverMultistepScheduler``; upper and
            lower case are one. ``DPM++ 2M`` is the official inference's: linspace spacing, last sigma
            ``sigma_min``.
        prediction: what the model predicts, ``epsilon`` or ``v_prediction``; as ``noise`` says if left out.
        noise: what the model expects of its noise.
        schedule: apart from the name, as A1111 has it: ``Karras``, ``SGM Uniform`` ...; ``Automatic`` is what
            A1111 takes for this sampler.

    Raises:
        UserError: unknown sampler or schedule, or a schedule that the sampler cannot follow.
    """
    if prediction is not None:
        noise = replace(noise, prediction_type=prediction)  # pyright: ignore[reportArgumentType]
    chosen = SamplerName.read(name, schedule)
    said = SAMPLERS[chosen.sampler]
    if said.kind == "LMSDiscreteScheduler":
        require_packages("the sampler LMS")
    kind = getattr(diffusers, said.kind)
    accepted = kind._get_init_keys(kind)
    arguments = {**SD15_SCHEDULE, **noise.settings, **said.settings}
    if chosen.schedule is None and chosen.sampler.startswith("DPM++ 2M"):
        arguments |= {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    if noise.rescale_betas_zero_snr:
        arguments |= _from_noise_alone(chosen.sampler, accepted)
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    if chosen.sampler == RESTART:
        return scheduled(kind, restarts=True)(**arguments, **{SETTING: RESTART})
    if chosen.schedule is None:
        return kind(**arguments)
    _check_trained_for(chosen, noise)
    flag = _FLAGS.get(chosen.schedule, "use_karras_sigmas")
    flags = {flag: True} if flag in accepted else {}
    return scheduled(kind)(**arguments, **flags, **{SETTING: chosen.schedule})


def _check_trained_for(chosen: SamplerName, noise: Noise) -> None:
    """Refuse a table of SD1.5's levels of noise for a model with others."""
    if chosen.schedule == "Align Your Steps" and noise.told.keys() - {"prediction_type"}:
        raise UserError(
            f"the schedule {chosen.schedule} is a table for SD1.5's noise, and this model's is of"
            f" {noise}; use Karras"
        )


def _from_noise_alone(title: str, accepted: set[str]) -> dict[str, Any]:
    """Settings for a model whose last step is noise alone: it must be among the steps (arXiv 2305.08891)."""
    if "rescale_betas_zero_snr" not in accepted:
        raise UserError(
            f"sampler {title} cannot draw with a model whose last step is noise alone (zero terminal SNR);"
            " use DDIM, DDPM, Euler, Euler a, DPM++ 2M, UniPC or LCM"
        )
    return {"timestep_spacing": "trailing"} if "timestep_spacing" in accepted else {}


def other_sampler(name: str, scheduler: Any, schedule: str | None = None) -> Any:
    """Another sampler for the model that a scheduler is made for.

    Args:
        name: see ``make_scheduler``.
        scheduler: whose configuration says what the model expects of its noise.
        schedule: see ``make_scheduler``.

    Raises:
        UserError: unknown sampler, or one that cannot draw with this model.
    """
    return make_scheduler(name, noise=scheduler_noise(scheduler), schedule=schedule)


def scheduler_noise(scheduler: Any) -> Noise:
    """What the model that a scheduler is made for expects of its noise.

    Raises:
        UserError: a model that this library cannot draw with.
    """
    config: Mapping[str, Any] = scheduler.config
    return Noise.of(config, f"the {type(scheduler).__name__} of this pipeline")
