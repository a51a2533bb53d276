"""PyTorch's own forward hooks, hung so that they come off in any order.

They survive accelerate's and diffusers' swaps of ``forward``, and take nobody else's hooks along.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


class Hook:
    """A function on a module's forward pass.

    A copy or a pickle of the module has an empty one: what hangs on a network belongs to that network alone.

    Args:
        function: what is called, with the arguments of PyTorch's hooks with ``with_kwargs=True``; None for
            nothing.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return None if self.function is None else self.function(*arguments)

    def __deepcopy__(self, _: Any) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)


def hang_before(
    stack: ExitStack, module: nn.Module, function: Callable[..., Any], first: bool = False
) -> None:
    """Call ``function(module, args, kwargs)`` before each forward pass, until ``stack`` closes.

    It may return other (args, kwargs). Hooks act in the order in which they were hung; ``first`` puts this
    one before those that hang already.
    """
    _hang(
        stack,
        function,
        lambda hook: module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first),
    )


def hang_after(stack: ExitStack, module: nn.Module, function: Callable[..., Any]) -> None:
    """Call ``function(module, args, kwargs, output)`` after each forward pass, until ``stack`` closes.

    It may return another output.
    """
    _hang(stack, function, lambda hook: module.register_forward_hook(hook, with_kwargs=True))


def _hang(stack: ExitStack, function: Callable[..., Any], register: Callable[[Hook], Any]) -> None:
    hook = Hook(function)
    handles: list[Any] = []

    def take_off() -> None:
        hook.function = None  # even where it could not be removed, it does nothing more
        for handle in handles:
            handle.remove()

    # Before it is hung: an interrupt in between leaves nothing that acts.
    stack.callback(take_off)
    handles.append(register(hook))


def hooks_of(module: nn.Module) -> list[Any]:
    """All hooks on a module's forward pass, whoever hung them."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
