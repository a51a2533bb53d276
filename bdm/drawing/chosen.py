"""Requests whose prompts say one thing: of variants and wildcards one is chosen, by the picture's seed."""

from __future__ import annotations

from dataclasses import replace

from ..text.variants import expand
from ..text.wildcards import NO_WILDCARDS, Wildcards
from .request import Request


def with_chosen(request: Request, wildcards: Wildcards = NO_WILDCARDS) -> Request:
    """A request with one of the texts that each of its prompts stands for, the same for the same seed.

    Args:
        request: whose prompts may hold ``{a|b}`` and ``__name__``; the official reading knows neither.
        wildcards: the files.

    Raises:
        UserError: a wildcard's file cannot be read.
    """
    if request.rules.emphasis != "a1111":
        return request
    names = ("prompt", "negative", "prompt_en", "negative_en")
    return replace(
        request, **{name: expand(getattr(request, name), request.seed, wildcards) for name in names}
    )
