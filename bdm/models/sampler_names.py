"""Samplers and schedules by the names people know, in and out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, printable
from .scheduled import RESTART, SETTING
from .sigma_schedules import SCHEDULES

_SDE: Mapping[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
_EXPONENTIAL = "Exponential"
AUTOMATIC = "Automatic"


@dataclass(frozen=True)
class Sampler:
    """What a name stands for.

    Attributes:
        kind: diffusers' class.
        short: k-diffusion's spelling.
        settings: of the class, that make it this sampler.
        automatic: A1111's own schedule for it, where that is no plain one.
        scheduled: whether its levels of noise may follow a schedule.
    """

    kind: str
    short: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    automatic: str | None = None
    scheduled: bool = True


#: By A1111's names; those that it does not have by diffusers'.
SAMPLERS: dict[str, Sampler] = {
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", "dpmpp_2m", automatic="Karras"),
    "DPM++ SDE": Sampler("DPMSolverSinglestepScheduler", "dpmpp_sde", _SDE, "Karras"),
    "DPM++ 2M SDE": Sampler("DPMSolverMultistepScheduler", "dpmpp_2m_sde", _SDE, _EXPONENTIAL),
    "DPM++ 2M SDE Heun": Sampler(
        "DPMSolverMultistepScheduler", "dpmpp_2m_sde_heun", {**_SDE, "solver_type": "heun"}, _EXPONENTIAL
    ),
    "DPM++ 3M SDE": Sampler(
        "DPMSolverMultistepScheduler", "dpmpp_3m_sde", {**_SDE, "solver_order": 3}, _EXPONENTIAL
    ),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", "euler_ancestral"),
    "Euler": Sampler("EulerDiscreteScheduler", "euler"),
    "LMS": Sampler("LMSDiscreteScheduler", "lms"),
    "Heun": Sampler("HeunDiscreteScheduler", "heun"),
    "DPM2": Sampler("KDPM2DiscreteScheduler", "dpm_2", automatic="Karras"),
    "DPM2 a": Sampler("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", automatic="Karras"),
    RESTART: Sampler("HeunDiscreteScheduler", "restart", automatic="Karras", scheduled=False),
    "DDIM": Sampler("DDIMScheduler", "ddim", scheduled=False),
    "PLMS": Sampler("PNDMScheduler", "plms", {"skip_prk_steps": True}, scheduled=False),
    "UniPC": Sampler("UniPCMultistepScheduler", "uni_pc"),
    "LCM": Sampler("LCMScheduler", "lcm", scheduled=False),
    "DDPM": Sampler("DDPMScheduler", "ddpm", scheduled=False),
    "DPM++ 2S": Sampler("DPMSolverSinglestepScheduler", "dpmpp_2s"),
    "DEIS": Sampler("DEISMultistepScheduler", "deis"),
    "SA-Solver": Sampler("SASolverScheduler", "sa_solver"),
    "TCD": Sampler("TCDScheduler", "tcd", scheduled=False),
}

#: Samplers of others that diffusers does not have, and what comes nearest.
NEAREST = {
    "DPM++ 2S a": "DPM++ SDE",
    "dpmpp_2s_ancestral": "DPM++ SDE",
    "DPM fast": "DPM++ 2S",
    "DPM adaptive": "DPM++ 2M",
    "DDIM CFG++": "DDIM",
    "Euler CFG++": "Euler",
    "Euler a CFG++": "Euler a",
    "heunpp2": "Heun",
    "ipndm": "PLMS",
    "ipndm_v": "PLMS",
    "res_multistep": "DPM++ 2M",
    "er_sde": "DPM++ 3M SDE",
    "gradient_estimation": "Euler",
}

#: Further spellings: of A1111's older pictures, of ComfyUI and InvokeAI.
_ALIASES = {
    "euler_a": "Euler a",
    "dpm_2_a": "DPM2 a",
    "DPM2 ancestral": "DPM2 a",
    "Euler ancestral": "Euler a",
    "pndm": "PLMS",
    "uni_pc_bh2": "UniPC",
    "dpmpp_2m_sde_gpu": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun_gpu": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde_gpu": "DPM++ 3M SDE",
    "dpmpp_sde_gpu": "DPM++ SDE",
}
_SCHEDULE_ALIASES = {"ka": "Karras", "ays": "Align Your Steps", "ddim_uniform": "DDIM", "kl": "KL Optimal"}


@dataclass(frozen=True)
class SamplerName:
    """A sampler and a schedule, by A1111's names.

    Attributes:
        sampler: a key of ``SAMPLERS``.
        schedule: a key of ``SCHEDULES``; None for the sampler's own steps, which are the official inference's
            for DPM++ 2M and diffusers' for others.
    """

    sampler: str
    schedule: str | None = None

    def __str__(self) -> str:
        return self.sampler if self.schedule is None else f"{self.sampler} {self.schedule}"

    @classmethod
    def read(cls, name: str, schedule: str | None = None) -> SamplerName:
        """Read a sampler's name in any spelling.

        Args:
            name: "DPM++ 2M Karras", "DPM++ 2M", "dpmpp_2m", "k_dpmpp_2m" or "DPMSolverMultistepScheduler", in
                upper or lower case.
            schedule: apart from the name: "Karras", "sgm_uniform" ...; "Automatic" is A1111's own choice for
                the sampler.

        Raises:
            UserError: unknown names, a sampler that diffusers does not have, a schedule that the sampler
                cannot follow, or two of them.
        """
        sampler, inside = _split(name)
        given = inside if schedule is None else _schedule(schedule)
        if inside is not None and given != inside:
            raise UserError(f"sampler {printable(name)!r} and schedule {schedule!r} differ; give one of them")
        said = SAMPLERS[sampler]
        chosen = said.automatic if given == AUTOMATIC else given
        if chosen is not None and not said.scheduled and (sampler, chosen) != (RESTART, "Karras"):
            raise UserError(
                f"sampler {sampler} has no {chosen.lower()} schedule; leave it out, or use it with another"
                f" sampler, such as {_LIKE.get(sampler, 'Euler')}"
            )
        return cls(sampler, None if sampler == RESTART else chosen)

    @classmethod
    def of(cls, scheduler: Any) -> SamplerName | None:
        """The names of a scheduler; None for one that has no name here.

        Args:
            scheduler: of diffusers; what ``make_scheduler`` makes has the names that it was made by.
                Spacing, and what the model predicts, are in no name.
        """
        config, kind = scheduler.config, type(scheduler).__name__
        told = config.get(SETTING)
        if told == RESTART:
            return cls(RESTART)
        if config.get("use_lu_lambdas") or config.get("use_flow_sigmas"):
            return None
        fitting = [title for title, said in SAMPLERS.items() if said.kind == kind and title != RESTART]
        fitting = [title for title in fitting if _is(SAMPLERS[title], config, fitting)]
        if not fitting:
            return None
        return cls(fitting[0], told if told is not None else _flagged(config))


#: Nearest to samplers without schedules, of those that have them.
_LIKE = {"DDIM": "Euler", "PLMS": "LMS", "DDPM": "Euler a", "LCM": "Euler", "TCD": "Euler", RESTART: "Heun"}


def _is(said: Sampler, config: Mapping[str, Any], among: list[str]) -> bool:
    """Whether a configuration has what makes a sampler, of all settings that tell it from its neighbours."""
    telling = {name for title in among for name in SAMPLERS[title].settings}
    defaults = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "solver_order": 2}
    wanted = {name: said.settings.get(name, defaults.get(name)) for name in telling}
    return all(config.get(name) == value for name, value in wanted.items())


def _flagged(config: Mapping[str, Any]) -> str | None:
    """The schedule that diffusers' own settings ask for."""
    flags = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": _EXPONENTIAL, "use_beta_sigmas": "Beta"}
    return next((name for flag, name in flags.items() if config.get(flag)), None)


def _key(name: str) -> str:
    """A name without what spellings differ in."""
    return re.sub(r"[\s_-]", "", name.lower().replace("+", "p"))


def _keys() -> dict[str, str]:
    """Samplers by all their spellings; the first of several that share a class has its name."""
    keys: dict[str, str] = {}
    for title, said in SAMPLERS.items():
        for spelling in (
            title,
            said.short,
            said.kind,
            said.kind.removesuffix("Scheduler"),
            f"k_{said.short}",
        ):
            keys.setdefault(_key(spelling), title)
    keys |= {_key(alias): title for alias, title in _ALIASES.items()}
    return keys | {_key(f"k_{alias}"): title for alias, title in _ALIASES.items()}


_KEYS = _keys()
_REFUSED = {_key(title): title for title in NEAREST} | {_key(f"sample_{title}"): title for title in NEAREST}
_SCHEDULE_KEYS = (
    {_key(title): title for title in (*SCHEDULES, AUTOMATIC)}
    | {_key(alias): title for alias, title in _SCHEDULE_ALIASES.items()}
)  # fmt: skip


def _split(name: str) -> tuple[str, str | None]:
    """A sampler, and the schedule that its name ends with."""
    if not isinstance(name, str):
        raise UserError(f"sampler {name!r} is no name; give one, such as 'DPM++ 2M'")
    key = _key(name)
    if key in _KEYS:
        return _KEYS[key], None
    for ending in sorted(_SCHEDULE_KEYS, key=len, reverse=True):
        base = key.removesuffix(ending)
        if base != key and base in _KEYS:
            return _KEYS[base], _SCHEDULE_KEYS[ending]
        if base in _REFUSED:
            key = base
    if key in _REFUSED:
        title = _REFUSED[key]
        raise UserError(f"sampler {title} is none of diffusers'; the nearest that is one is {NEAREST[title]}")
    close = difflib.get_close_matches(key, _KEYS, n=1)
    nearest = f"; did you mean {_KEYS[close[0]]}?" if close else ""
    raise UserError(
        f"unknown sampler {printable(name, 80)!r}; known are {', '.join(SAMPLERS)}, most of them also with a"
        f" schedule ({', '.join(SCHEDULES)}){nearest}"
    )


def _schedule(name: str) -> str:
    key = _key(name) if isinstance(name, str) else ""
    if key not in _SCHEDULE_KEYS:
        close = difflib.get_close_matches(key, _SCHEDULE_KEYS, n=1)
        nearest = f"; did you mean {_SCHEDULE_KEYS[close[0]]}?" if close else ""
        known = ", ".join((AUTOMATIC, *SCHEDULES))
        raise UserError(f"unknown schedule {printable(name, 80)!r}; known are {known}{nearest}")
    return _SCHEDULE_KEYS[key]
