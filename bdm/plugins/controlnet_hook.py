"""The hook by which a ControlNet acts: before each forward pass of the UNet its residuals are added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UserError
from ..method.clock import StepClock, Steps, in_window
from ..method.condition import Part
from ..method.hooks import hang_before
from ..method.parts import PartReader
from ..method.residuals import add_residuals, check_fit
from ..method.step import named_arguments


@dataclass(frozen=True)
class ControlCondition:
    """What a ControlNet is told during one call of a pipeline.

    Attributes:
        pictures: (k, 3, H, W) in [0, 1]; one for all prompts, or one for each.
        steps: gives the number of denoising steps T, or the pipeline's timesteps, once the pipeline knows it.
        images_per_prompt: consecutive samples that share a prompt.
        samples: of one guidance part, prompts x images_per_prompt; None where nobody has told.
        parts: gives the parts of the UNet's batch, as in ``bdm.NativeCondition``.
    """

    pictures: Tensor
    steps: Steps
    images_per_prompt: int = 1
    samples: int | None = None
    parts: Callable[[], Sequence[Part]] | None = None

    def count_parts(self, batch: int) -> int:
        """How many guidance parts a batch of the UNet has.

        Raises:
            UserError: nobody has told how many samples one has, or they are not whole.
        """
        if self.samples is None:
            raise UserError(
                "a ControlNet that pools its residuals acts on the positive part of a batch alone; give"
                " during_call samples=, the number of prompts x images per prompt"
            )
        parts, rest = divmod(batch, self.samples)
        if rest or not parts:
            raise UserError(f"the UNet got {batch} samples, no multiple of the {self.samples} that were told")
        return parts


class ControlNetHook:
    """Runs a ControlNet before every forward pass of the UNet and adds its residuals, as diffusers' pipelines
    do.

    It reads the UNet's own (English) text features. Without a condition it does nothing. It is one of
    PyTorch's own hooks, which others that exchange ``forward`` (accelerate, peft) leave alone and which
    leaves them alone.

    Args:
        controlnet: a ``ControlNetModel`` of the backbone's size.
        scale: factor of the residuals.
        start: the ControlNet is off in step i of T where i/T < start.
        end: ... and where (i+1)/T > end.
    """

    def __init__(self, controlnet: Any, scale: float = 1.0, start: float = 0.0, end: float = 1.0) -> None:
        self.controlnet = controlnet
        self.scale, self.start, self.end = scale, start, end
        self._session: _Session | None = None

    def attach(self, stack: ExitStack, unet: Any) -> None:
        """Hang on a UNet until ``stack`` closes.

        Raises:
            UserError: the ControlNet's blocks or text width are not the UNet's.
        """
        keys = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels")
        check_fit(self.controlnet, unet, keys, "ControlNet")
        _refuse_other_inputs(self.controlnet.config)
        hang_before(stack, unet, self._before)

    def check_size(self, pictures: Tensor, height: int, width: int) -> None:
        """Refuse control pictures of another size than what is drawn.

        Args:
            pictures: (k, 3, H, W).
            height: of the latents.
            width: of the latents.

        Raises:
            UserError: names both sizes.
        """
        factor = 2 ** (len(self.controlnet.config["conditioning_embedding_out_channels"]) - 1)
        if pictures.shape[-2:] != (height * factor, width * factor):
            raise UserError(
                f"the control picture is {pictures.shape[-1]}x{pictures.shape[-2]}, the picture to draw is "
                f"{width * factor}x{height * factor}; resize one of them"
            )

    @contextmanager
    def condition(self, condition: ControlCondition) -> Iterator[None]:
        """Everything the UNet computes inside the ``with`` block is controlled by ``condition``."""
        outer = self._session  # of a call in whose callback this one is made
        try:
            self._session = _Session(condition, StepClock(condition.steps), PartReader(cast(Any, condition)))
            yield
        finally:
            self._session = outer

    def _before(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the ControlNet's residuals to the arguments of the UNet's forward pass."""
        session = self._session
        if session is None:
            return None
        values = named_arguments(unet, args, kwargs)
        if not session.in_window(values["timestep"], self.start, self.end) or self.scale == 0.0:
            return None
        rows: slice | Tensor = slice(None)
        if self.controlnet.config["global_pool_conditions"]:
            rows = session.positive_rows(values["sample"], values["encoder_hidden_states"], unet)
            if not len(rows):
                return None
        down, middle = self._residuals(session.condition, values, rows)
        given = list(values)[: len(args)]
        add_residuals(values, down, middle, values["sample"].dtype)
        return tuple(values.pop(name) for name in given), values

    def _residuals(
        self, condition: ControlCondition, values: dict[str, Any], rows: slice | Tensor
    ) -> tuple[Any, Any]:
        """The residuals of a batch, those of samples that are not among ``rows`` zero."""
        sample, text = values["sample"], values["encoder_hidden_states"]
        if (self.controlnet.device, self.controlnet.dtype) != (sample.device, sample.dtype):
            self.controlnet.to(sample.device, sample.dtype)  # the pipeline was moved after attaching
        pictures = self._pictures(condition, sample)
        down, middle = self.controlnet(
            sample[rows], _rows_of(values["timestep"], rows), encoder_hidden_states=text[rows],
            controlnet_cond=pictures[rows], conditioning_scale=self.scale, return_dict=False,
        )  # fmt: skip
        return [_spread(one, rows, len(sample)) for one in down], _spread(middle, rows, len(sample))

    def _pictures(self, condition: ControlCondition, sample: Tensor) -> Tensor:
        """The condition pictures, one for each sample of the UNet's batch (guidance parts are stacked)."""
        self.check_size(condition.pictures, sample.shape[-2], sample.shape[-1])
        pictures = condition.pictures.to(sample.device, sample.dtype)
        if len(pictures) == 1:
            return pictures.expand(len(sample), -1, -1, -1)
        pictures = pictures.repeat_interleave(condition.images_per_prompt, dim=0)
        if len(sample) % len(pictures) or condition.samples not in (None, len(pictures)):
            raise UserError(
                f"{len(condition.pictures)} control pictures for another number of prompts; give one, or one"
                " for each"
            )
        return pictures.repeat(len(sample) // len(pictures), 1, 1, 1)


@dataclass(frozen=True)
class _Session:
    """A condition in force, and what tells the steps and parts of its call."""

    condition: ControlCondition
    clock: StepClock
    reader: PartReader
    rows: dict[tuple[Part, ...], Tensor] = field(default_factory=dict)

    def in_window(self, timestep: Any, start: float, end: float) -> bool:
        if start <= 0.0 and end >= 1.0:
            return True
        return in_window(self.clock.tick(timestep), self.clock.total, start, end)

    def positive_rows(self, sample: Tensor, text: Tensor, unet: Any) -> Tensor:
        """Indices of a batch's samples that are drawn for positive prompts."""
        parts = self.reader.parts(len(sample), text, unet)
        if parts not in self.rows:  # one tensor for all steps
            positive = torch.tensor([part != "negative" for part in parts])
            rows = positive.repeat_interleave(len(sample) // len(parts)).nonzero().flatten()
            self.rows[parts] = rows.to(sample.device)
        return self.rows[parts]


def _rows_of(timestep: Any, rows: slice | Tensor) -> Any:
    """A timestep for some samples: one for all stays what it is."""
    return timestep[rows] if isinstance(timestep, Tensor) and timestep.numel() > 1 else timestep


def _spread(residual: Tensor, rows: slice | Tensor, count: int) -> Tensor:
    """A residual of some samples as one of all; the others get zeros."""
    if isinstance(rows, slice):
        return residual
    return residual.new_zeros(count, *residual.shape[1:]).index_copy(0, rows, residual)


def _refuse_other_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a ControlNet that needs more than latents, English text and an RGB picture.

    Raises:
        UserError: names what else.
    """
    others = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
    other = next((key for key in others if config.get(key) is not None), None)
    if other is not None:
        raise UserError(
            f"the ControlNet needs inputs of another kind ({other} {config[other]}); use one for SD1.5"
        )
    if (channels := config.get("conditioning_channels", 3)) != 3:
        raise UserError(f"the ControlNet reads pictures of {channels} channels; use one that reads RGB")
