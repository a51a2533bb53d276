"""Classes that stand in for a module's own for a while, with another way to compute the same.

A module's class is exchanged, not its ``forward``: then whoever wraps ``forward`` before is seen and let
alone, who wraps it later (accelerate's offload, peft) wraps ours, copies and pickles of the module are of its
own class, and all of that comes off in any order.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

from torch import nn

#: Under which name a module keeps what its stand-in needs.
_STATE = "_bdm_stand_in"
#: Held while a class is exchanged: two pipelines in two threads may share a branch.
_STANDING_IN = threading.Lock()


class StandIn:
    """Base of the classes that stand in.

    Attributes:
        own: the class that it stands in for.
    """

    own: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain modules."""
        reduced: Any = super().__reduce_ex__(protocol)
        state = {name: value for name, value in reduced[2].items() if name != _STATE}
        return copyreg._reconstructor, (self.own, object, None), state  # pyright: ignore[reportAttributeAccessIssue]


def stand_in(stack: ExitStack, module: nn.Module, compute: Callable[..., Any]) -> None:
    """Let ``compute(module, plain, *args, **kwargs)`` compute in a module's place until ``stack`` closes.

    Args:
        stack: ends it.
        module: nothing is done where something stands in for it already, or wraps its ``forward``.
        compute: gets the module, its class's own ``forward``, and the arguments.
    """
    with _STANDING_IN:
        own = type(module)
        if issubclass(own, StandIn) or "forward" in vars(module):  # which would hide another class's
            return
        kind = _stand_in_class(own)

        def take_off() -> None:
            vars(module).pop(_STATE, None)
            if type(module) is kind:
                module.__class__ = own

        # Before it acts: an interrupt in between leaves nothing behind.
        stack.callback(take_off)
        vars(module)[_STATE] = compute
        module.__class__ = kind


@cache
def _stand_in_class(own: type[nn.Module]) -> type[nn.Module]:
    plain: Any = own.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A wrapper may still hold this method when the stand-in has been taken off.
        compute = vars(self).get(_STATE)
        return plain(self, *args, **kwargs) if compute is None else compute(self, plain, *args, **kwargs)

    body = {"own": own, "forward": forward, "__module__": __name__, "__doc__": own.__doc__}
    return type(own.__name__, (StandIn, own), body)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's own class, whoever stands in for it."""
    return module.own if isinstance(module, StandIn) else type(module)
