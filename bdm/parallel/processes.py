"""How processes that a launcher started find each other."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ..errors import UserError


def make_accelerator(mixed_precision: str, accumulation: int, **options: Any) -> Accelerator:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        accumulation: batches of one step.
        options: further arguments of ``Accelerator``.

    Raises:
        UserError: the processes did not find each other.
    """
    zero = launched_with("DEEPSPEED")
    if zero:
        # Its engine would cast the frozen models too; autocast leaves all weights in fp32 (see
        # ``DeepSpeedStrategy``).
        mixed_precision = "no"
        # The launcher writes its own default into this variable, which accelerate prefers to its argument.
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(accumulation)
        if not torch.cuda.is_available():
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
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
