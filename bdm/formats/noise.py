"""What a denoiser was trained to predict, and on which noise schedule.

Nothing in its weights tells: files and folders say so beside them, and most say nothing, which means SD1.5's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, first_line, printable
from ..extras import require_packages
from .folders import read_json

Prediction = Literal["epsilon", "v_prediction"]

#: Schedulers of diffusers for models of this kind, by the names that folders give. A folder names what is
#: built of it, so nothing else is looked up.
SCHEDULERS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
#: Settings whose defaults in these classes are not SD1.5's; the others' are.
OWN_DEFAULTS = {"beta_start", "beta_end", "beta_schedule"}


@dataclass(frozen=True)
class Noise:
    """What a denoiser expects of its noise; the defaults are SD1.5's.

    Attributes:
        prediction_type: what it predicts: the noise, or the velocity (arXiv 2202.00512).
        rescale_betas_zero_snr: whether it was trained with noise alone at the last step (arXiv 2305.08891).
        beta_start: variance that the first step adds.
        beta_end: ... and the last.
        beta_schedule: how it grows between them, in diffusers' words.
        num_train_timesteps: steps in all.
        trained_betas: all of the variances, where a model has ones of its own.
    """

    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], source: object) -> Noise:
        """What a scheduler's configuration says; what it leaves out is SD1.5's.

        Raises:
            UserError: it predicts neither noise nor velocity, or holds values of other kinds.
        """
        said = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if said.get("trained_betas") is not None:
            said["trained_betas"] = _betas(said["trained_betas"], source)
        for name, value in said.items():
            _check(name, value, source)
        return cls(**said)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a diffusers scheduler."""
        betas = None if self.trained_betas is None else list(self.trained_betas)
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"trained_betas": betas}

    @property
    def told(self) -> dict[str, Any]:
        """The settings that are not SD1.5's."""
        return {name: value for name, value in self.settings.items() if value != SD15_NOISE.settings[name]}

    def __str__(self) -> str:
        return ", ".join(f"{name} {printable(value, 40)}" for name, value in self.told.items()) or "SD1.5's"

    def differences(self, other: Noise) -> list[str]:
        """Settings in which two models differ, for messages: "prediction_type v_prediction, not epsilon"."""
        return [
            f"{name} {printable(value, 40)}, not {printable(other.settings[name], 40)}"
            for name, value in self.settings.items()
            if value != other.settings[name]
        ]


SD15_NOISE = Noise()


def _betas(given: Any, source: object) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= 10_000:
        raise UserError(f"{source} says trained_betas {printable(given, 40)}; get it again")
    for beta in given:
        _check("beta_end", beta, source)
    return tuple(map(float, given))


def _check(name: str, value: Any, source: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "prediction_type": value in ("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": isinstance(value, bool),
        "beta_start": number and 0 <= value <= 1,
        "beta_end": number and 0 <= value <= 1,
        "beta_schedule": value in ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "num_train_timesteps": number and 1 <= value <= 10_000 and value == int(value),
        "trained_betas": True,
    }
    if not right[name]:
        allowed = "; this library draws with epsilon and v_prediction" if name == "prediction_type" else ""
        raise UserError(f"{source} says {name} {printable(value, 40)!r}{allowed}, so it cannot be used")


def read_scheduler(folder: Path) -> Any:
    """The scheduler that a model's folder names, by its ``scheduler/scheduler_config.json``.

    Returns:
        A diffusers scheduler, or None where the folder has none.

    Raises:
        UserError: a class that is not diffusers' for such models, settings that it does not take, or one
            that needs a package which is missing.
    """
    config = _config(folder)
    if not config.is_file():
        return None
    settings = _read_settings(config)
    name = settings["_class_name"]
    if name == "LMSDiscreteScheduler":
        require_packages("the sampler LMS")
    import diffusers

    kind = getattr(diffusers, name)
    if settings.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in kind._get_init_keys(kind):
        raise UserError(
            f"{config} says rescale_betas_zero_snr, which a {name} cannot do; name a DDIMScheduler there"
        )
    try:
        # Settings of other classes are left out; one that is left out has its class's own default.
        scheduler = kind.from_config(settings)
    except Exception as error:  # each class has checks and mistakes of its own
        raise UserError(f"{config} cannot be used ({first_line(error)}); get the folder again") from None
    Noise.of(scheduler.config, config)
    return scheduler


def _config(folder: Path) -> Path:
    return folder / "scheduler" / "scheduler_config.json"


def _read_settings(config: Path) -> dict[str, Any]:
    settings = read_json(config)
    name = settings.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(
            f"{config} names the scheduler {printable(name, 80)!r}; allowed are {', '.join(SCHEDULERS)}: get"
            " the folder again, or name one of these"
        )
    if settings.get("use_flow_sigmas"):
        raise UserError(f"{config} says use_flow_sigmas; models of flows cannot be used here")
    Noise.of(settings, config)
    return settings


def folder_noise(folder: Path) -> Noise:
    """What a diffusers folder says of its denoiser's noise; SD1.5's where it has no scheduler.

    Raises:
        UserError: see ``read_scheduler``.
    """
    config = _config(folder)
    if not config.is_file():
        return SD15_NOISE
    settings = _read_settings(config)
    # Nothing is left for its class to decide or to refuse, so it is not imported.
    if settings.keys() >= OWN_DEFAULTS and not settings.get("rescale_betas_zero_snr"):
        return Noise.of(settings, config)
    return Noise.of(read_scheduler(folder).config, config)
