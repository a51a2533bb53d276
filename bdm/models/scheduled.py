"""Samplers of diffusers that stop at levels of noise which diffusers has no schedule for."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import numpy as np
import torch

from .restart import Restarting, restart_levels
from .sigma_schedules import ENDS_AT_LOWEST, SCHEDULES, karras

#: Under which name a scheduler's configuration says its schedule.
SETTING = "sigma_schedule"
#: What it says where the sampler goes back up to noise on its way.
RESTART = "Restart"


@cache
def scheduled(kind: Any, restarts: bool = False) -> Any:
    """A sampler's class, with a further setting ``sigma_schedule``: one of A1111's names.

    It goes by its base's name, so that a pipeline saved with it is one of diffusers', which warns of a
    setting that it ignores; loaded here, it is itself again (see ``restore``).

    Args:
        kind: a scheduler's class of diffusers that works with levels of noise (``sigmas``).
        restarts: whether it goes back up to noise on its way; of ``HeunDiscreteScheduler``.
    """
    bases = (Restarting, kind) if restarts else (kind,)

    class Scheduled(*bases):
        made_of = kind

        @wraps(kind.__init__)
        def __init__(self, *args: Any, sigma_schedule: str, **settings: Any) -> None:
            self.register_to_config(**{SETTING: sigma_schedule})  # first, since some set their steps here
            super().__init__(*args, **settings)

        @staticmethod
        def _get_init_keys(input_class: Any) -> set[str]:
            return kind._get_init_keys(input_class) | ({SETTING} if input_class is Scheduled else set())

        def set_timesteps(self, num_inference_steps: int, device: Any = None, *args: Any) -> None:
            kind.set_timesteps(self, num_inference_steps, device, *args)
            name = self.config[SETTING]
            if restarts:
                self._set_pairs(restart_levels(num_inference_steps, _trained(self)), device)
            elif "use_karras_sigmas" not in kind._get_init_keys(kind):
                self._set_levels(self._levels(num_inference_steps), device)
            # Classes whose formulas do not reach 0 would end at the last level, with the noise that is left.
            if self.order == 1 and (name in ENDS_AT_LOWEST or self.sigmas[-1] > 0):
                self.sigmas[-1] = _trained(self)[0]

        def _set_levels(self, levels: Any, device: Any) -> None:
            """For a class that has no schedules of its own."""
            self.timesteps = _times(self, levels).to(device)
            self.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)

        def _set_pairs(self, pairs: Any, device: Any) -> None:
            """For Heun's method: each step's two levels; the last one, to 0, has no second half."""
            levels = np.array(pairs).flatten()
            self.timesteps = _times(self, levels[:-1]).to(device)
            self.sigmas = torch.tensor(levels, dtype=torch.float32)

        def _levels(self, n: int) -> Any:
            return SCHEDULES.get(self.config[SETTING], karras)(n, _trained(self))

        # Where diffusers asks for one of its schedules, and goes on to make its own use of it.
        def _convert_to_karras(self, in_sigmas: Any, num_inference_steps: int | None = None) -> Any:
            return self._levels(num_inference_steps or self.num_inference_steps)

        _convert_to_exponential = _convert_to_karras

        def __reduce__(self) -> tuple[Any, ...]:
            return _remade, (kind, restarts, self.__dict__)

    Scheduled.__name__, Scheduled.__qualname__ = kind.__name__, kind.__qualname__
    Scheduled.__module__, Scheduled.__doc__ = kind.__module__, kind.__doc__
    return Scheduled


def restore(scheduler: Any) -> Any:
    """A scheduler as its configuration says it was saved.

    Args:
        scheduler: of diffusers, made from a configuration that may be of one of ours.
    """
    name = scheduler.config.get(SETTING)
    if hasattr(scheduler, "made_of") or (name not in SCHEDULES and name != RESTART):
        return scheduler
    return scheduled(type(scheduler), name == RESTART).from_config(scheduler.config)


def _trained(scheduler: Any) -> Any:
    """The levels of noise that the model was trained at, rising."""
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()
    return ((1 - alphas) / alphas) ** 0.5


def _times(scheduler: Any, levels: Any) -> torch.Tensor:
    """The timesteps of levels of noise, in straight lines of the logarithm between the trained ones."""
    trained = np.log(_trained(scheduler))
    times = np.interp(np.log(levels), trained, np.arange(len(trained)))
    return torch.from_numpy(times.astype(np.float32))


def _remade(kind: Any, restarts: bool, state: dict[str, Any]) -> Any:
    made = object.__new__(scheduled(kind, restarts))
    made.__dict__.update(state)
    return made
