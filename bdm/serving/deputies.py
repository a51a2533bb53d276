"""Networks that stand in a drawing's pipeline and hand each call to somebody else.

A deputy is of its network's class and answers for it in everything but the call. It has no weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..method.step import named_arguments

#: Is given the network that is called and the arguments by name, and gives the result.
Ask = Callable[[Any, Mapping[str, Any]], Any]


class Deputy(nn.Module):
    """Base of the classes of deputies."""

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.__dict__["_stands_for"].dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.__dict__["_stands_for"].device

    def __getattr__(self, name: str) -> Any:
        """What a deputy does not have is its network's."""
        return getattr(self.__dict__["_stands_for"], name)


def deputy(network: Any, ask: Ask) -> Any:
    """A deputy of a network.

    Args:
        network: that it stands for.
        ask: gets its calls.
    """
    kind = _deputy_class(type(network))
    made = kind.__new__(kind)
    vars(made)["_stands_for"] = network  # not as a module, whose weights would be the deputy's
    nn.Module.__init__(made)
    vars(made)["_ask"], made.training = ask, network.training
    return made


@functools.cache
def _deputy_class(own: type[nn.Module]) -> Any:
    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = vars(self)["_stands_for"]
        return vars(self)["_ask"](network, named_arguments(network, args, kwargs))

    body = {"forward": forward, "__module__": __name__, "__doc__": own.__doc__}
    return type(own.__name__, (Deputy, own), body)
