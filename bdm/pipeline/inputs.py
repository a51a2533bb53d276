"""The inputs of a stock pipeline's call, which are a bilingual pipeline's too."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError

#: What stock pipelines still take although they name it no more.
_OLD = ("callback", "callback_steps")


def stock_inputs(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The inputs of a stock pipeline's call, by name."""
    return {name: p for name, p in inspect.signature(call).parameters.items() if name != "self"}


def with_inputs_of(stock: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call under a signature that names the stock call's inputs beside its own.

    diffusers and its interfaces read off the signature what a pipeline takes.

    Args:
        stock: the stock pipeline's call.
        call: ours, which hands on whatever it has no name for.
    """

    @functools.wraps(call)
    def both(self: Any, *arguments: Any, **inputs: Any) -> Any:
        return call(self, *arguments, **inputs)

    own = inspect.signature(call)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    others = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in stock_inputs(stock).items()
        if name not in own.parameters and parameter.kind is not parameter.VAR_KEYWORD
    ]
    both.__signature__ = own.replace(parameters=[*named, *others])  # pyright: ignore[reportAttributeAccessIssue]
    return both


def check_inputs(given: Iterable[str], stock: Callable[..., Any], pipeline: type) -> None:
    """Refuse inputs that neither call knows; stock pipelines take many of them for nothing.

    Args:
        given: names that are not ours.
        stock: the stock pipeline's call.
        pipeline: whose call it is.

    Raises:
        UserError: names the first one.
    """
    known = stock_inputs(stock)
    old = _OLD if any(p.kind is p.VAR_KEYWORD for p in known.values()) else ()
    for name in given:
        if name not in known and name not in old:
            close = difflib.get_close_matches(name, inspect.signature(pipeline.__call__).parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else "help(pipe.__call__) shows what there is"
            raise UserError(f"a {pipeline.__name__} takes no {name!r}; {hint}")
