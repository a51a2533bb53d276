"""Weights as a base with deltas on it.

A weight in use is the base (or the last replacement) plus the sum of the changes. It is always worked out
from the untouched base, so taking them off in any order gives back the very tensors from before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..formats.weights import is_finite
from .parameters import (
    Owned,
    Trace,
    foreign_layers,
    owned_parameters,
    refuse_foreign,
    refuse_foreign_hooks,
    refuse_missing,
)

#: A weight's place: part of the pipeline and name of the parameter.
Place = tuple[str, str]


@dataclass
class WeightDelta:
    """What one plug-in does to weights.

    Attributes:
        replaced: weights that take the base's place.
        changes: from a base weight to its change at strength 1 (float32).
        rows: rows appended to a weight (token embeddings).
        strength: factor of the changes, by part.
        words: trigger words and how many of the rows each stands for, in their order.
    """

    replaced: dict[Place, Tensor] = field(default_factory=dict)
    changes: dict[Place, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    rows: dict[Place, Tensor] = field(default_factory=dict)
    strength: dict[str, float] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)

    def places(self) -> set[Place]:
        """The weights it touches."""
        return {*self.replaced, *self.changes, *self.rows}


class WeightStack:
    """The weights of live modules as a base and deltas on it.

    Args:
        module: gives the module of a part.
    """

    def __init__(self, module: Callable[[str], nn.Module]) -> None:
        self._module = module
        self._deltas: dict[str, WeightDelta] = {}
        self._base: dict[Place, Tensor] = {}
        self._traces: dict[Place, Trace] = {}

    def base(self, part: str) -> dict[str, Tensor]:
        """The base weights of a part by name."""
        owned = self._owned(part)
        # The parameters themselves: asking for their values would unpack those that are packed.
        return {name: self._base.get((part, name), own.parameter) for name, own in owned.items()}

    def check(self, part: str) -> None:
        """Refuse a part of which not every weight can be acted on.

        Raises:
            UserError: names one (see ``put``).
        """
        for name, owned in self._owned(part).items():
            refuse_foreign(owned, part, name, new=True)
        for name in self.foreign(part):
            refuse_missing(self._module(part), part, name)

    def foreign(self, part: str) -> list[str]:
        """Names of weights that a part would have if its layers were ordinary (see ``put``)."""
        return [f"{layer}.weight" for layer in foreign_layers(self._module(part))]

    @property
    def deltas(self) -> Mapping[str, WeightDelta]:
        """The deltas by name, in the order they were put on."""
        return self._deltas

    def put(self, name: str, delta: WeightDelta) -> None:
        """Add a delta, or replace the one of that name; if it fails, nothing has changed.

        Raises:
            UserError: it does not fit the weights, even where its strength is 0; a weight would be NaN or
                infinite; the weights are offloaded, quantised, carry another adapter, were changed by others,
                or are no longer there.
        """
        before = self._deltas.get(name, WeightDelta())
        self._apply({**self._deltas, name: delta}, before.places() | delta.places(), name)

    def remove(self, name: str) -> None:
        """Take a delta away; nothing happens if there is none of that name.

        Raises:
            UserError: its weights are offloaded, carry a fused adapter, were changed by others, or are no
                longer there; it stays then.
        """
        deltas = {key: delta for key, delta in self._deltas.items() if key != name}
        self._apply(deltas, self._deltas[name].places() if name in self._deltas else set())

    def _owned(self, part: str) -> dict[str, Owned]:
        return owned_parameters(self._module(part))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply(self, deltas: dict[str, WeightDelta], places: set[Place], new: str | None = None) -> None:
        parts = {part: self._owned(part) for part in {part for part, _ in places}}
        for part in parts:
            refuse_foreign_hooks(self._module(part), part)
        for part, name in places:
            self._check(part, name, parts[part].get(name), attaching=new not in (None, *self._deltas))
        # Everything is worked out before anything is changed.
        parameters = {place: parts[place[0]][place[1]].parameter for place in places}
        fresh = {place: self._compute(place, p, deltas, new) for place, p in parameters.items()}
        if new is not None:
            _refuse_overflow(new, deltas[new], fresh)
        self._exchange(parameters, fresh, deltas)

    def _check(self, part: str, name: str, owned: Owned | None, attaching: bool) -> None:
        """Refuse to act on a weight that is not there, not ordinary, or not as it was left."""
        if owned is None:
            return refuse_missing(self._module(part), part, name)
        refuse_foreign(owned, part, name, attaching)
        trace, data = self._traces.get((part, name)), owned.parameter.data
        if trace is not None and not trace.fits(data) and not Trace.of(self._base[part, name]).fits(data):
            raise UserError(
                f"{part}.{name} was changed by others since plug-ins were put on it (an adapter fused, other"
                " weights or embeddings loaded); undo that, then change or detach plug-ins"
            )

    def _exchange(
        self,
        parameters: Mapping[Place, nn.Parameter],
        fresh: Mapping[Place, Tensor],
        deltas: dict[str, WeightDelta],
    ) -> None:
        """Put weights in place, all of them or none."""
        before = {place: parameter.data for place, parameter in parameters.items()}
        traces = self._traces | {place: Trace.of(weight) for place, weight in fresh.items()}
        in_use = {place for delta in deltas.values() for place in delta.places()}
        base = {place: tensor for place, tensor in (before | self._base).items() if place in in_use}
        traces = {place: trace for place, trace in traces.items() if place in in_use}
        known = self._deltas, self._base, self._traces
        try:
            for place, parameter in parameters.items():
                parameter.data = fresh[place]
            self._deltas, self._base, self._traces = deltas, base, traces
        except BaseException:  # such as an interrupt by the user
            for place, parameter in parameters.items():
                parameter.data = before[place]
            self._deltas, self._base, self._traces = known
            raise

    def _compute(
        self, place: Place, parameter: nn.Parameter, deltas: Mapping[str, WeightDelta], new: str | None
    ) -> Tensor:
        weight = self._base.get(place, parameter.data)
        if (weight.device, weight.dtype) != (
            parameter.device,
            parameter.dtype,
        ):  # the pipeline was moved meanwhile
            weight = weight.to(parameter.device, parameter.dtype)
        for delta in deltas.values():
            if place in delta.replaced:
                weight = delta.replaced[place].to(weight.device, weight.dtype)
        total = _total_change(place, weight, deltas, new)
        if total is not None:
            weight = (weight.float() + total).to(weight.dtype)
        rows = [
            delta.rows[place].to(weight.device, weight.dtype)
            for delta in deltas.values()
            if place in delta.rows
        ]
        return torch.cat([weight, *rows]) if rows else weight


def _total_change(
    place: Place, weight: Tensor, deltas: Mapping[str, WeightDelta], new: str | None
) -> Tensor | None:
    """The sum of the deltas' changes of a weight; None where there are none.

    Of the ``new`` delta also those are worked out that strength 0 leaves out: whether a file fits must not
    depend on it.
    """
    total = None
    for name, delta in deltas.items():
        strength = delta.strength.get(place[0], 1.0)
        if place not in delta.changes or (strength == 0.0 and name != new):
            continue
        change = delta.changes[place](weight)
        if strength != 0.0:
            total = change * strength if total is None else total + change * strength
        elif not is_finite(change):
            raise _overflow(name, place, change)
    return total


def _refuse_overflow(name: str, delta: WeightDelta, fresh: Mapping[Place, Tensor]) -> None:
    """Refuse a delta with which a weight is NaN or beyond its dtype's range."""
    for place, weight in fresh.items():
        as_read = weight is delta.replaced.get(place)  # checked when it was read
        if not as_read and not is_finite(weight):
            raise _overflow(name, place, weight)


def _overflow(name: str, place: Place, weight: Tensor) -> UserError:
    dtype = str(weight.dtype).removeprefix("torch.")
    return UserError(
        f"{name} makes {'.'.join(place)} NaN or larger than {dtype} can hold; use a smaller strength, or get"
        " the file again"
    )
