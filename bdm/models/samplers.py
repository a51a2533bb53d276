"""Samplers by the names people know.

``DPM++ 2M Karras``, ``dpmpp_2m``, a sampler with a schedule, or a diffusers class.
"""

from __future__ import annotations

import re
from typing import Any

import diffusers

from ..errors import UserError
from ..extras import require_packages
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


def make_scheduler(name: str, prediction: str = "epsilon") -> Any:
    """A diffusers scheduler with SD1.5's noise schedule.

    Args:
        name: a sampler in any spelling, with an optional noise schedule: ``DPM++ 2M``, ``dpmpp_2m``,
            ``DPM++ 2M Karras``, ``dpmpp_2m_karras``; upper and lower case are one. ``DPM++ 2M`` is the
            official inference's: linspace spacing, last sigma ``sigma_min``.
        prediction: what the model predicts: ``epsilon`` or ``v_prediction``.

    Raises:
        UserError: unknown sampler, or a schedule that it does not have.
    """
    words = re.sub(r"[\s_]+", " ", name.strip().lower())
    schedule = next((s for s in _SCHEDULES if words.endswith(f" {s}")), None)
    base = words.removesuffix(f" {schedule}") if schedule else words.removesuffix(" automatic")
    for title, (class_name, _, short) in SAMPLERS.items():
        if base in (title.lower(), short.replace("_", " "), class_name.lower()):
            break
    else:
        known = ", ".join(SAMPLERS)
        raise UserError(f"unknown sampler {name!r}; known are {known}, each also with Karras or Exponential")
    kind = scheduler_class(class_name)
    assert kind is not None
    arguments = {"prediction_type": prediction, **SAMPLERS[title][1]}
    accepted = kind._get_init_keys(kind)
    if schedule:
        if _SCHEDULES[schedule] not in accepted:
            raise UserError(f"sampler {title} has no {schedule} schedule; leave it out")
        arguments[_SCHEDULES[schedule]] = True
    if title.startswith("DPM++ 2M"):
        arguments |= {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    return kind(**{key: value for key, value in SD15_SCHEDULE.items() if key in accepted} | arguments)


def scheduler_class(name: str) -> Any:
    """A scheduler of diffusers by its class name; None if there is none.

    Raises:
        UserError: it needs a package that is not installed.
    """
    if name == "LMSDiscreteScheduler":
        require_packages("the sampler LMS")
    return getattr(diffusers, name, None)
