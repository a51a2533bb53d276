"""Samplers as requests and pictures name them: A1111's names of sampler and schedule apart."""

from __future__ import annotations

from typing import Any

from ..errors import UserError, quoted
from ..models.sampler_names import SamplerName
from ..models.samplers import make_scheduler, other_sampler


def named(sampler: str, schedule: str = "") -> tuple[str, str]:
    """A1111's names of a sampler in any spelling, and of a schedule; "" for its own.

    Raises:
        UserError: an unknown sampler, or a schedule that it cannot follow.
    """
    if not sampler:
        if schedule:
            raise UserError(f"schedule {quoted(schedule)} is of a sampler; name the sampler too")
        return "", ""
    found = SamplerName.read(sampler, schedule or None)
    make_scheduler(found.sampler, schedule=found.schedule)  # a package that it needs may be missing
    return found.sampler, found.schedule or ""


def scheduler_names(scheduler: Any) -> tuple[str, str]:
    """A1111's names of a scheduler and its schedule; its class's where A1111 has none."""
    found = SamplerName.of(scheduler)
    return (type(scheduler).__name__, "") if found is None else (found.sampler, found.schedule or "")


def put_sampler(pipe: Any, own: Any, sampler: str, schedule: str = "") -> None:
    """Give a pipeline a sampler; "" gives it back its own.

    Args:
        pipe: the pipeline.
        own: the scheduler that its model came with.
        sampler: A1111's name.
        schedule: likewise; "" for the sampler's own.

    Raises:
        UserError: unknown, or one that cannot draw with this model.
    """
    pipe.scheduler = other_sampler(sampler, own, schedule or None) if sampler else own
