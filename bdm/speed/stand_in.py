"""Classes that stand in for a module's own for a while, with another way to compute the same.

A module's class is exchanged, not its ``forward``: then whoever wraps ``forward`` before is seen and let alone, who
wraps it later (accelerate's offload, peft) wraps ours, copies and pickles of the module are of its own class, and
all of that comes off in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

from torch import nn

#: Under which name a module keeps what its stand-in needs.
_STATE = "_bdm_stand_in"


class StandIn:
    """Base of the classes that stand in.

    Attributes:
        own: the class that it stands in for.
    """

    own: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stand-in computes, or the module's own where it has been taken off meanwhile."""
        state = vars(self).get(_STATE)
        plain: Any = self.own.forward
        if state is None:
            return plain(self, *args, **kwargs)
        return state(self, plain, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain modules."""
        build, args, state, *rest = super().__reduce_ex__(protocol)
        args = tuple(self.own if argument is type(self) else argument for argument in args)
        return build, args, {name: value for name, value in state.items() if name != _STATE}, *rest


def stand_in(stack: ExitStack, module: nn.Module, compute: Callable[..., Any]) -> None:
    """Let ``compute(module, plain, *args, **kwargs)`` compute in a module's place until ``stack`` closes.

    Args:
        stack: ends it.
        module: of a class that is no stand-in's.
        compute: gets the module, its class's own ``forward``, and the arguments.
    """
    own = type(module)
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
    return type(own.__name__, (StandIn, own), {"own": own, "__module__": __name__, "__doc__": own.__doc__})


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's own class, whoever stands in for it."""
    return module.own if isinstance(module, StandIn) else type(module)
