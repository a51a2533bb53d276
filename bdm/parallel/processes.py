"""How processes that a launcher started find each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from ..errors import UserError


def make_accelerator(
    mixed_precision: str, accumulation: int, timeout: float | None = None, **options: Any
) -> Accelerator:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        accumulation: batches of one step.
        timeout: seconds that a process waits for the others; the library's own if None.
        options: further arguments of ``Accelerator``.

    Raises:
        UserError: the processes did not find each other.
    """
    zero = launched_with("DEEPSPEED")
    joining: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    if zero:
        # Its engine would cast the frozen models too; autocast leaves all weights in fp32 (see
        # ``DeepSpeedStrategy``).
        mixed_precision = "no"
        # The launcher writes its own default into this variable, which accelerate prefers to its argument.
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(accumulation)
        if not torch.cuda.is_available():
            joining["backend"] = "gloo"
    if joining:
        options["kwargs_handlers"] = [InitProcessGroupKwargs(**joining)]
    accelerator = Accelerator(
        cpu=cpu_only(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        step_scheduler_with_optimizer=False,
        **options,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started and see {accelerator.num_processes} of each other; start them"
            " with accelerate launch"
        )
    return accelerator


@dataclass(frozen=True)
class Share:
    """A process's share of work that each could do alone; of a single process all of it.

    All processes do the same number of calls, because weights may be split over them: one that has nothing to
    do repeats the last item, and what it makes of it counts nothing.

    Attributes:
        accelerator: joins the processes; None for one alone.
    """

    accelerator: Any = None

    def part(self, count: int) -> range:
        """The places of ``count`` items, at least 1, that this process looks after."""
        each, start = self._each(count)
        start = min(start, count - 1)
        return range(start, min(start + each, count))

    def own(self, count: int) -> int:
        """How many of them count; 0 for a process that repeats the last."""
        each, start = self._each(count)
        return max(0, min(each, count - start))

    def places(self, count: int) -> list[int]:
        """The same, as many in each process: the last item is repeated where there are too few."""
        each, start = self._each(count)
        return [min(start + i, count - 1) for i in range(each)]

    def join(self, rows: Tensor, count: int) -> Tensor:
        """All processes' rows (``places``, ...) as (``count``, ...); joint work."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return rows
        return self.accelerator.gather(rows.contiguous())[:count]

    def mean(self, total: Tensor, count: float) -> float:
        """The sum of all processes' totals over that of their counts; joint work."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return (total / count).item()
        own = torch.stack([total, total.new_tensor(count)]).to(self.accelerator.device)
        everything, number = self.accelerator.reduce(own, "sum").tolist()
        return everything / number

    def _each(self, count: int) -> tuple[int, int]:
        """How many items a process has at most, and where this one's begin."""
        processes = self.accelerator.num_processes if self.accelerator is not None else 1
        number = self.accelerator.process_index if self.accelerator is not None else 0
        each = -(-count // processes)
        return each, number * each


def cpu_only() -> bool:
    """Whether there is no GPU.

    Accelerate must be told, or else each of several processes takes itself for the only one.
    """
    return not torch.accelerator.is_available() and not launched_with("DEEPSPEED")


def launched_with(name: str) -> bool:
    """Whether the launcher's configuration asks for FSDP or DEEPSPEED.

    Accelerate itself ignores FSDP without a GPU.
    """
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
