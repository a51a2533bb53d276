"""What the branch is told while a pipeline draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from .clock import Steps, in_window
from .schedule import Schedule

#: What a guidance part of a batch is drawn for; number k is the k-th further prompt that AND joins.
Part = Literal["negative", "positive"] | int

#: A guided step's batch.
GUIDED: tuple[Part, ...] = ("negative", "positive")


@dataclass(frozen=True)
class Stage:
    """What the branch is told up to a step.

    Attributes:
        last: the step, from 1.
        positive: (P, L, D) features of the prompts, and of each further one that AND joins to them.
        negative: (P or 1, L, D) features of the negative prompts.
    """

    last: int
    positive: tuple[Tensor, ...]
    negative: Tensor | None = None


def stage_of(ends: Sequence[int], step: int) -> int:
    """Which stage a step i, from 0, belongs to; the last one holds to the end.

    Args:
        ends: the last step of each stage, from 1.
        step: i.
    """
    return next((stage for stage, last in enumerate(ends) if step < last), len(ends) - 1)


@dataclass(frozen=True)
class NativeCondition:
    """What the branch is told during one call of a pipeline.

    Attributes:
        positive: (P, L, D) features of the native prompts.
        negative: (P or 1, L, D) features of the native negative prompts; needed where the pipeline uses
            guidance.
        scale: factor of the residuals.
        start: share of the steps before which the branch is off.
        end: share of the steps after which it is off.
        schedule: factors of the scale over the steps; None for 1 in all (see ``bdm.method.schedule``).
        steps: gives the number of denoising steps T, or the pipeline's timesteps, once the pipeline knows it;
            only asked if start or end restrict, or by a schedule.
        images_per_prompt: consecutive samples that share a prompt.
        parts: gives the parts of the UNet's batch where the pipeline's batches cannot be told apart by their
            English texts: ``("negative", "positive")`` and so on, each of P x images_per_prompt samples.
        stages: what is said in the steps up to each one's last, where that changes; ``positive`` and
            ``negative`` are then the first stage's.
    """

    positive: Tensor
    negative: Tensor | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    schedule: Schedule | None = None
    steps: Steps | None = None
    images_per_prompt: int = 1
    parts: Callable[[], Sequence[Part]] | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def samples(self) -> int:
        """Samples of one guidance part."""
        return len(self.positive) * self.images_per_prompt

    def scale_at(self, step: Callable[[], int], total: Callable[[], int]) -> float:
        """Factor of the residuals in a step.

        Args:
            step: gives the denoising step i, from 0.
            total: gives T. Neither is asked where it makes no difference.
        """
        if self.scale == 0.0:
            return 0.0
        windowed = self.start > 0.0 or self.end < 1.0
        if windowed and not in_window(step(), total, self.start, self.end):
            return 0.0
        return self.scale if self.schedule is None else self.scale * self.schedule.at(step(), total())

    def count_parts(self, batch: int) -> int:
        """How many parts a batch of the UNet has.

        Raises:
            UserError: the batch is not made of whole parts.
        """
        parts, rest = divmod(batch, self.samples)
        if rest or not parts:
            raise UserError(
                f"the UNet got {batch} samples for {len(self.positive)} native prompts x"
                f" {self.images_per_prompt} images, which is no multiple: give one native prompt for each"
                " English one"
            )
        return parts

    def stage(self, step: Callable[[], int]) -> int:
        """The number of a step's stage; the step is only asked for where there are several."""
        ends = [stage.last for stage in self.stages]
        return 0 if len(ends) < 2 else stage_of(ends, step())

    def features(self, parts: Sequence[Part], stage: int = 0) -> Tensor:
        """Features for a UNet's batch.

        Args:
            parts: what each part of the batch is drawn for.
            stage: its number.

        Returns:
            (parts x P x images_per_prompt, L, D).

        Raises:
            UserError: a part is negative and the condition has no negative features.
        """
        if "negative" in parts and self.negative is None:
            raise UserError(
                "the pipeline uses guidance and the native condition has no negative features; give them"
            )
        said = self.stages[stage] if self.stages else Stage(0, (self.positive,), self.negative)
        rows: dict[Part, Tensor] = {"positive": said.positive[0]}
        if said.negative is not None:
            rows["negative"] = said.negative.expand(len(self.positive), -1, -1)
        for part in parts:
            if isinstance(part, int):  # a branch that is told one prompt says it in all parts
                rows[part] = said.positive[part] if part < len(said.positive) else said.positive[0]
        repeated = {part: value.repeat_interleave(self.images_per_prompt, 0) for part, value in rows.items()}
        return repeated[parts[0]] if len(parts) == 1 else torch.cat([repeated[part] for part in parts])
