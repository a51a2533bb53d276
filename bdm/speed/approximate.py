"""Work left out at the price of another picture; everything here is off unless it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..errors import UserError
from .sharing import RowPlan

HOOK_NAME = "bdm.reuse"


@dataclass(frozen=True)
class Approximation:
    """What a call leaves out. The defaults leave out nothing.

    Attributes:
        guidance_start: guidance is off in step i of T where i/T < guidance_start: only the positive half is
            computed, as if the guidance scale were 1 ("Applying Guidance in a Limited Interval", arXiv
            2404.07724).
        guidance_end: ... and where (i+1)/T > guidance_end.
        branch_every: the branch runs in every n-th step and its residuals are added again in those between.
        deep_every: everything below the outermost block, of backbone and branch, runs in every n-th step and
            its features are used again in those between (DeepCache, arXiv 2312.00858).
    """

    guidance_start: float = 0.0
    guidance_end: float = 1.0
    branch_every: int = 1
    deep_every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.guidance_start <= self.guidance_end <= 1.0:
            raise UserError(
                f"guidance interval {self.guidance_start} to {self.guidance_end}: both must lie in [0, 1],"
                " start before end"
            )
        if min(self.branch_every, self.deep_every) < 1:
            raise UserError(
                f"branch_every {self.branch_every}, deep_every {self.deep_every}: each must be at least 1"
            )


#: Nothing is left out.
EXACT = Approximation()


class ReusedOutput(ModelHook):
    """Gives a module's last output again until the schedule asks for a new one."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self._kept: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output, or the kept one."""
        if self.schedule.due:
            compute: Any = self.fn_ref.original_forward
            self._kept = compute(*args, **kwargs)
        return self._kept


class Schedule:
    """When a group of modules is computed anew: in every n-th step, and whenever the kind of work changes.

    Attributes:
        due: whether the modules are computed in the current step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.due = True
        self._work: Any = None
        self._age = 0

    def next(self, work: Any) -> None:
        """Begin a step.

        Args:
            work: what must be equal for features to be used again, such as the number of samples.
        """
        self._age = 0 if work != self._work else (self._age + 1) % self.every
        self._work, self.due = work, self._age == 0


class ReusedWork:
    """Puts the hooks of an approximation on a backbone and its branch, and takes them off."""

    def __init__(self, approximation: Approximation) -> None:
        self.approximation = approximation
        self.half = RowPlan()
        self._branch, self._deep = Schedule(approximation.branch_every), Schedule(approximation.deep_every)
        self._hooked: list[nn.Module] = []

    def attach(self, unet: Any, branch: Any) -> None:
        """Hook the modules whose outputs are used again."""
        if self.approximation.deep_every > 1:
            below = [network.down_blocks[1:] for network in (unet, branch)]
            for module in (*below[0], *below[1], unet.mid_block, branch.mid_block, *unet.up_blocks[:-1]):
                self._hook(module, self._deep)
        if self.approximation.branch_every > 1:
            self._hook(branch, self._branch)

    def _hook(self, module: nn.Module, schedule: Schedule) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(ReusedOutput(schedule), HOOK_NAME)
        self._hooked.append(module)

    def detach(self) -> None:
        """Take all hooks off, with what they keep."""
        for module in self._hooked:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK_NAME, recurse=False)
        self._hooked.clear()

    def begin(self, *work: Any) -> None:
        """Begin a step; features are used again as long as all of ``work`` is equal."""
        self._branch.next(work)
        self._deep.next(work)
