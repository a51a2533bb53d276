"""The shape that every kind of plug-in has: how it attaches, how it detaches, what strength means."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UserError, quoted
from ..formats.identify import Kind
from ..method.clock import Steps
from ..method.condition import Part
from .attachments import Attachments
from .controlnet_hook import ControlNetHook

#: Strengths beyond draw nothing but NaN, long before a weight is infinite.
MOST = 1e6
#: A plug-in's strengths by what they act on, such as "unet" and "text_encoder".
Strengths = dict[str, float]


@dataclass(frozen=True)
class PipelineCall:
    """What plug-ins are told of one call of the pipeline.

    Attributes:
        control_images: condition pictures by ControlNet name, or the only one's; None without any.
        steps: gives the number of denoising steps T, or the pipeline's timesteps, once the pipeline knows it.
        images_per_prompt: consecutive samples that share a prompt.
        latents: their height and width where these are known.
        samples: prompts x images_per_prompt where that is known.
        parts: gives the parts of the UNet's batches where their texts do not tell (see
            ``bdm.NativeCondition``).
        controlnets: hooks by name that act in this call; None for those that are attached.
    """

    control_images: Any = None
    steps: Steps = lambda: 1
    images_per_prompt: int = 1
    latents: tuple[int, int] | None = None
    samples: int | None = None
    parts: Callable[[], Sequence[Part]] | None = None
    controlnets: Mapping[str, ControlNetHook] | None = None


class PluginKind(ABC):
    """One kind of plug-in on one pipeline.

    Args:
        to: what the plug-ins hang on.

    Attributes:
        kind: what it is called.
        sources: the kinds of file that it can come from.
    """

    kind: ClassVar[Kind]
    sources: ClassVar[tuple[Kind, ...]]

    def __init__(self, to: Attachments) -> None:
        self.to = to

    @abstractmethod
    def attach(self, path: Path, name: str) -> Strengths | None:
        """Attach a file or folder; keyword arguments of a kind are its settings.

        Returns:
            Its strengths; None where strength has no meaning.

        Raises:
            UserError: it is damaged, or does not fit; nothing has changed then.
        """

    @abstractmethod
    def detach(self, name: str) -> None:
        """Undo what a plug-in does; nothing happens if none of that name is attached.

        Raises:
            UserError: its module was exchanged, is offloaded, or was changed by others; nothing has changed
                then.
        """

    def strengths(self, name: str, strength: float, text_strength: float | None) -> Strengths:
        """What two numbers mean for a plug-in of this kind.

        Raises:
            UserError: nothing, or one is no finite number.
        """
        raise UserError(f"{name} is a {self.kind}; strength has no meaning for it")

    def set_strengths(self, name: str, strengths: Mapping[str, float]) -> None:
        """Change a plug-in's strengths; nothing is read again.

        Raises:
            UserError: a weight overflows; its module was exchanged or is offloaded. Nothing has changed then.
        """
        raise AssertionError(f"{self.kind} has no strengths")

    def during(self, call: PipelineCall) -> AbstractContextManager[None]:
        """Whatever the plug-ins of this kind need for the time of a call of the pipeline.

        Raises:
            UserError: something that they need is missing, or does not fit.
        """
        return nullcontext()


def finite(value: Any, what: str = "strength") -> float:
    """A strength, or another setting, as a number.

    Raises:
        UserError: it is none, not finite, or so large that nothing could be drawn with it.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UserError(f"{what} {quoted(value)} is no number; give one such as 0.8")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # whole numbers may be of any length
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{what} {number} is not a finite number; give one such as 0.8")
    if abs(number) > MOST:
        raise UserError(
            f"{what} {number:g} is larger than what float32 can hold beside ordinary weights; give one from"
            f" -{MOST:g} to {MOST:g}, such as 0.8"
        )
    return number
