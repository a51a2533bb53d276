"""Samplers as requests and pictures name them: A1111's names of sampler and schedule apart."""

from __future__ import annotations

from typing import Any

from ..models.sampler_names import SamplerName
from ..models.samplers import other_sampler


def named(sampler: str, schedule: str = "") -> tuple[str, str]:
    """A1111's names of a sampler in any spelling, and of a schedule.

    Raises:
        UserError: an unknown sampler, or a schedule that it does not have.
    """
    if not sampler:
        return "", ""
    name = SamplerName.read(sampler, schedule or None)
    return name.sampler, name.schedule or ""


def scheduler_names(scheduler: Any) -> tuple[str, str]:
    """A1111's names of a scheduler and its schedule; its class's where A1111 has none."""
    name = SamplerName.of(scheduler)
    return (name.sampler, name.schedule or "") if name else (type(scheduler).__name__, "")


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
    pipe.scheduler = other_sampler(sampler, own, schedule or None) if sampler else own
