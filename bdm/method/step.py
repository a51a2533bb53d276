"""One call of the UNet under a condition, and what may help with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from .clock import StepClock, in_window
from .condition import NativeCondition, Part
from .parts import version_of


@dataclass
class UNetCall:
    """The arguments of a UNet's forward pass and what the condition says of them.

    Attributes:
        values: the arguments that were given, by name.
        positional: how many of them were given by position.
        conditions: what each branch is told in the pipeline's call, its own first.
        parts: what each part of the batch is drawn for; the parts have equally many samples.
        clock: tells the denoising step.
        unet: the UNet.
    """

    values: dict[str, Any]
    positional: int
    conditions: tuple[NativeCondition, ...]
    parts: tuple[Part, ...]
    clock: StepClock
    unet: Any
    _step: int | None = None
    _scales: tuple[float, ...] | None = None

    @property
    def scales(self) -> tuple[float, ...]:
        """Factors of the branches' residuals in this step; those of 0 do not act."""
        if self._scales is None:
            self._scales = tuple(
                condition.scale_at(lambda: self.step, self.clock.total) for condition in self.conditions
            )
        return self._scales

    @property
    def sample(self) -> Tensor:
        """(B, C, h, w) latents; of AnimateDiff (B, C, F, h, w)."""
        return self.values["sample"]

    @property
    def text(self) -> Any:
        """(B, M, E) English text features."""
        return self.values.get("encoder_hidden_states")

    @property
    def step(self) -> int:
        """The denoising step i, from 0."""
        if self._step is None:
            self._step = self.clock.tick(self.values["timestep"])
        return self._step

    def in_window(self, start: float, end: float) -> bool:
        """Whether this step lies in a window (see ``bdm.method.clock.in_window``)."""
        if start <= 0.0 and end >= 1.0:
            return True
        return in_window(self.step, self.clock.total, start, end)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) in the form in which they came."""
        names = list(self.values)
        positional, named = names[: self.positional], names[self.positional :]
        return tuple(self.values[name] for name in positional), {name: self.values[name] for name in named}


class StepHelper(Protocol):
    """Saves or leaves out work of the steps under a condition; the bridge itself knows none.

    A helper belongs to one bridge. Whatever it hangs on the networks ends with the condition.
    """

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """A condition begins: hang what is needed; ``stack`` closes when it ends."""
        ...

    def before(self, call: UNetCall) -> None:
        """Before each forward pass of the UNet and of the branch; may change the call's values and parts."""
        ...

    def after(self, output: Any) -> Any:
        """Behind each forward pass: the output, or another in its place."""
        ...


class OneResult:
    """What was made of a tensor: one result for all steps that are given it as it was.

    A callback may put another in its place between two steps, or write into it.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int | None, Tensor] | None = None

    def of(self, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(tensor)``, from the last time where nothing has changed since."""
        kept, version = self._kept, version_of(tensor)
        if kept is None or kept[0] is not tensor or kept[1] != version or version is None:
            kept = self._kept = (tensor, version, make(tensor))
        return kept[2]


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass by name, those given by position first."""
    names = _parameter_names(type(module).forward)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
