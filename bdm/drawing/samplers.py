"""Samplers as requests and pictures name them: A1111's names of sampler and schedule apart."""

from __future__ import annotations

from typing import Any

from ..models.samplers import SAMPLERS, make_scheduler, other_sampler


def named(sampler: str, schedule: str = "") -> tuple[str, str]:
    """A1111's names of a sampler in any spelling, and of a schedule.

    Raises:
        UserError: an unknown sampler, or a schedule that it does not have.
    """
    if not sampler:
        return "", ""
    return scheduler_names(make_scheduler(f"{sampler} {schedule}".strip()))


def scheduler_names(scheduler: Any) -> tuple[str, str]:
    """A1111's names of a scheduler and its schedule; its class's where A1111 has none."""
    kind, config = type(scheduler).__name__, scheduler.config
    fitting = [
        title
        for title, (name, settings, _) in SAMPLERS.items()
        if name == kind and all(config.get(key) == value for key, value in settings.items())
    ]
    schedules = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential"}
    schedule = next((name for flag, name in schedules.items() if config.get(flag)), "")
    return (max(fitting, key=len) if fitting else kind), schedule


def put_sampler(pipe: Any, own: Any, sampler: str, schedule: str = "") -> None:
    """Give a pipeline a sampler; "" gives it back its own.

    Args:
        pipe: the pipeline.
        own: the scheduler that its model came with.
        sampler: A1111's name.
        schedule: likewise.

    Raises:
        UserError: unknown, or one that cannot draw with this model.
    """
    pipe.scheduler = other_sampler(f"{sampler} {schedule}".strip(), own) if sampler else own
