"""Work left out at the price of another picture; everything here is off unless it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UserError, quoted, whole_number
from ..method.composed import ComposedGuidance
from ..method.condition import GUIDED
from ..method.step import OneResult, StepHelper, UNetCall
from .recognise import call_is_known, is_known
from .rows import Rows
from .stand_in import stand_in


@dataclass(frozen=True)
class Approximation:
    """What a call leaves out. The defaults leave out nothing.

    Attributes:
        guidance_start: guidance is off in step i of T where i/T < guidance_start: only the positive half is
            computed, as if the guidance scale were 1 ("Applying Guidance in a Limited Interval", arXiv
            2404.07724).
        guidance_end: ... and where (i+1)/T > guidance_end.
        branch_every: the branch runs in every n-th step and its residuals are added again in those between;
            other branches beside it run in all.
        deep_every: everything below the outermost block, of backbone and branch, runs in every n-th step and
            its features are used again in those between (DeepCache, arXiv 2312.00858).
    """

    guidance_start: float = 0.0
    guidance_end: float = 1.0
    branch_every: int = 1
    deep_every: int = 1

    def __post_init__(self) -> None:
        for value in (self.guidance_start, self.guidance_end):
            if not isinstance(value, Real):
                raise UserError(f"the guidance interval holds {quoted(value)}, which is no number")
        if not 0.0 <= self.guidance_start <= self.guidance_end <= 1.0:
            raise UserError(
                f"guidance interval {self.guidance_start} to {self.guidance_end}: both must lie in [0, 1],"
                " start before end"
            )
        if any((whole_number(every) or 0) < 1 for every in (self.branch_every, self.deep_every)):
            raise UserError(
                f"branch_every {quoted(self.branch_every)}, deep_every {quoted(self.deep_every)}: each must"
                " be a whole number and at least 1"
            )


#: Nothing is left out.
EXACT = Approximation()


class GuidanceInterval:
    """Computes only the positive half of a guided step outside of an interval of the steps.

    Args:
        start: see ``Approximation.guidance_start``.
        end: see ``Approximation.guidance_end``.
    """

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self._rows: Rows | None = None
        self._text = OneResult()

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Nothing: it changes what the UNet is given."""

    def before(self, call: UNetCall) -> None:
        """Leave the negative half out."""
        self._rows = None
        if call.parts != GUIDED or not call_is_known(call) or call.in_window(self._start, self._end):
            return
        self._rows = rows = Rows.part(len(call.sample), 1, 2, call.sample.device)
        text, ours = call.text, self._text.of(call.text, rows.select)
        call.values = {
            name: ours if value is text else pytree.tree_map_only(Tensor, rows.select, value)
            for name, value in call.values.items()
        }
        call.parts = GUIDED[1:]

    def after(self, output: Any) -> Any:
        """The positive half's result for both, as if the guidance scale were 1."""
        rows, self._rows = self._rows, None
        return output if rows is None else pytree.tree_map_only(Tensor, rows.spread, output)


class ReusedOutputs:
    """Computes modules in every n-th step, and uses their outputs again in those between.

    Calls of one step (the views of a panorama) each have outputs of their own. Outputs are used again only
    for the same kind of work: a call with as many samples, for the same parts, with the branch as strong as
    then. Modules that something else is on are computed in every step.

    Args:
        every: n.
        modules: gives the modules of a backbone and its branch.
    """

    def __init__(self, every: int, modules: Callable[[Any, Any], list[nn.Module]]) -> None:
        self._every, self._modules = every, modules
        self._kept: dict[Any, tuple[int, tuple[float, ...], dict[tuple[int, int, int], Any]]] = {}
        self._step, self._calls = -1, 0
        self._current: dict[tuple[int, int, int], Any] = {}
        self._runs: dict[tuple[int, int], int] = {}
        self._due = True
        self._thread = 0

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Let the modules' outputs be kept until ``stack`` closes."""
        self._kept, self._step, self._calls = {}, -1, 0
        stack.callback(self._kept.clear)
        for module in self._modules(unet, branch):
            if is_known(module):
                stand_in(stack, module, self._compute)

    def before(self, call: UNetCall) -> None:
        """Decide whether this call computes anew."""
        self._thread = threading.get_ident()
        self._calls = self._calls + 1 if call.step == self._step else 0
        self._step = call.step
        work = (len(call.sample), call.parts, _acting(call), id(call.conditions[0]), self._calls)
        kept = self._kept.get(work)
        self._due = kept is None or not 0 < call.step - kept[0] < self._every or kept[1] != call.scales
        if self._due:
            self._kept[work] = (call.step, call.scales, {})
        self._current, self._runs = self._kept[work][2], {}

    def after(self, output: Any) -> Any:
        """The output as it is."""
        return output

    def _compute(self, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        if self._thread != threading.get_ident():  # another pipeline is at work with the same branch
            return plain(module, *args, **kwargs)
        # Sharing may have made fewer rows of the batch.
        layer = (id(module), _rows_of([*args, *kwargs.values()]))
        # One branch may be told several texts, each in a run of its own.
        run = self._runs[layer] = self._runs.get(layer, 0) + 1
        place = (*layer, run)
        if self._due or place not in self._current:
            self._current[place] = plain(module, *args, **kwargs)
        return self._current[place]


def helpers_of(approximation: Approximation, composed: ComposedGuidance | None = None) -> list[StepHelper]:
    """What leaves out the work; nothing for ``EXACT``.

    Args:
        approximation: what is left out.
        composed: makes three parts of those that the guidance interval leaves, before anything is reused.
    """
    helpers: list[StepHelper] = []
    if (approximation.guidance_start, approximation.guidance_end) != (0.0, 1.0):
        helpers.append(GuidanceInterval(approximation.guidance_start, approximation.guidance_end))
    if composed is not None:
        helpers.append(composed)
    if approximation.deep_every > 1:
        helpers.append(ReusedOutputs(approximation.deep_every, _below_the_outermost))
    if approximation.branch_every > 1:
        helpers.append(ReusedOutputs(approximation.branch_every, lambda unet, branch: [branch]))
    return helpers


def _acting(call: UNetCall) -> tuple[bool, ...]:
    return tuple(scale != 0.0 for scale in call.scales)


def _rows_of(values: list[Any]) -> int:
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def _below_the_outermost(unet: Any, branch: Any) -> list[nn.Module]:
    below = [*unet.down_blocks[1:], *branch.down_blocks[1:]]
    return [*below, unet.mid_block, branch.mid_block, *unet.up_blocks[:-1]]
