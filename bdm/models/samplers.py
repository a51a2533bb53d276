"""Samplers by the names people know.

``DPM++ 2M Karras``, ``dpmpp_2m``, a sampler with a schedule, or a diffusers class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers

from ..errors import UserError
from ..extras import require_packages
from ..formats.noise import SD15_NOISE, Noise
from .noise_schedule import SD15_SCHEDULE

#: Sampler names of A1111 -> (diffusers class, its arguments, the k-diffusion spelling).
SAMPLERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {}, "dpmpp_sde"),
    "DPM2": ("KDPM2DiscreteScheduler", {}, "dpm_2"),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}, "dpm_2_ancestral"),
    "Euler": ("EulerDiscreteScheduler", {}, "euler"),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
    "Heun": ("HeunDiscreteScheduler", {}, "heun"),
    "LMS": ("LMSDiscreteScheduler", {}, "lms"),
    "UniPC": ("UniPCMultistepScheduler", {}, "uni_pc"),
    "DDIM": ("DDIMScheduler", {}, "ddim"),
    "DDPM": ("DDPMScheduler", {}, "ddpm"),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}, "plms"),
    "LCM": ("LCMScheduler", {}, "lcm"),
}
_SCHEDULES = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}


def make_scheduler(name: str, prediction: str | None = None, noise: Noise = SD15_NOISE) -> Any:
    """A diffusers scheduler, with SD1.5's noise schedule unless another is given.

    Args:
        name: a sampler in any spelling, with an optional noise schedule: ``DPM++ 2M``, ``dpmpp_2m``,
            ``DPM++ 2M Karras``, ``dpmpp_2m_karras``; upper and lower case are one. ``DPM++ 2M`` is the
            official inference's: linspace spacing, last sigma ``sigma_min``.
        prediction: what the model predicts, ``epsilon`` or ``v_prediction``; as ``noise`` says if left out.
        noise: what the model expects of its noise.

    Raises:
        UserError: unknown sampler, or a schedule that it does not have.
    """
    if prediction is not None:
        noise = replace(noise, prediction_type=prediction)  # pyright: ignore[reportArgumentType]
    words = re.sub(r"[\s_]+", " ", name.strip().lower())
    schedule = next((s for s in _SCHEDULES if words.endswith(f" {s}")), None)
    base = words.removesuffix(f" {schedule}") if schedule else words.removesuffix(" automatic")
    for title, (class_name, _, short) in SAMPLERS.items():
        if base in (title.lower(), short.replace("_", " "), class_name.lower()):
            break
    else:
        known = ", ".join(SAMPLERS)
        raise UserError(f"unknown sampler {name!r}; known are {known}, each also with Karras or Exponential")
    if class_name == "LMSDiscreteScheduler":
        require_packages("the sampler LMS")
    kind = getattr(diffusers, class_name)
    arguments = {**noise.settings, **SAMPLERS[title][1]}
    accepted = kind._get_init_keys(kind)
    if schedule:
        if _SCHEDULES[schedule] not in accepted:
            raise UserError(f"sampler {title} has no {schedule} schedule; leave it out")
        arguments[_SCHEDULES[schedule]] = True
    if title.startswith("DPM++ 2M"):
        arguments |= {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    if noise.rescale_betas_zero_snr:
        arguments |= _from_noise_alone(title, accepted)
    return kind(**{key: value for key, value in (SD15_SCHEDULE | arguments).items() if key in accepted})


def _from_noise_alone(title: str, accepted: set[str]) -> dict[str, Any]:
    """Settings for a model whose last step is noise alone: it must be among the steps (arXiv 2305.08891)."""
    if "rescale_betas_zero_snr" not in accepted:
        raise UserError(
            f"sampler {title} cannot draw with a model whose last step is noise alone (zero terminal SNR);"
            " use DDIM, DDPM, Euler, Euler a, DPM++ 2M, UniPC or LCM"
        )
    return {"timestep_spacing": "trailing"} if "timestep_spacing" in accepted else {}


def other_sampler(name: str, scheduler: Any) -> Any:
    """Another sampler for the model that a scheduler is made for.

    Args:
        name: see ``make_scheduler``.
        scheduler: whose configuration says what the model expects of its noise.

    Raises:
        UserError: unknown sampler, or one that cannot draw with this model.
    """
    return make_scheduler(name, noise=scheduler_noise(scheduler))


def scheduler_noise(scheduler: Any) -> Noise:
    """What the model that a scheduler is made for expects of its noise.

    Raises:
        UserError: a model that this library cannot draw with.
    """
    config: Mapping[str, Any] = scheduler.config
    return Noise.of(config, f"the {type(scheduler).__name__} of this pipeline")
