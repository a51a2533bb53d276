"""ControlNets on the backbone, beside the branch: a hook on the UNet, as the bridge is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..errors import UserError
from ..formats.checkpoint import load_controlnet
from ..method.clock import StepClock, Steps, check_window, in_window
from ..method.residuals import add_residuals, check_fit
from .control_images import annotate as annotate
from .control_images import canny_edges as canny_edges
from .control_images import control_tensor as control_tensor
from .control_images import open_picture as open_picture
from .kind import PipelineCall, PluginKind, Strengths, finite

_HOOK = "bdm.plugins.controlnet."


@dataclass(frozen=True)
class ControlCondition:
    """What a ControlNet is told during one call of a pipeline.

    Attributes:
        pictures: (k, 3, H, W) in [0, 1]; one for all prompts, or one for each.
        steps: gives the number of steps T, or the timesteps, once the pipeline knows it.
        images_per_prompt: consecutive samples that share a prompt.
    """

    pictures: Tensor
    steps: Steps
    images_per_prompt: int = 1


class ControlNetHook(ModelHook):
    """Runs a ControlNet before every forward pass of the UNet and adds its residuals, as diffusers' pipelines
    do.

    It reads the UNet's own (English) text features. Without a condition it does nothing.

    Args:
        controlnet: a ``ControlNetModel`` of the backbone's size.
        scale: factor of the residuals.
        start: the ControlNet is off in step i of T where i/T < start.
        end: ... and where (i+1)/T > end.
    """

    def __init__(self, controlnet: Any, scale: float = 1.0, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.scale, self.start, self.end = scale, start, end
        self._condition: ControlCondition | None = None
        self._clock = StepClock(None)

    def attach(self, unet: Any, name: str) -> None:
        """Put the hook on a UNet.

        Raises:
            UserError: the ControlNet's blocks or text width are not the UNet's.
        """
        keys = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels")
        check_fit(self.controlnet, unet, keys, "ControlNet")
        HookRegistry.check_if_exists_or_initialize(unet).register_hook(self, name)

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
        self._condition, self._clock = condition, StepClock(condition.steps)
        try:
            yield
        finally:
            self._condition = None

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add the ControlNet's residuals to the arguments of the UNet's forward pass."""
        condition = self._condition
        if condition is None:
            return args, kwargs
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, text = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names))
        if self.scale == 0.0 or not self._is_on(timestep):
            return args, kwargs
        if (self.controlnet.device, self.controlnet.dtype) != (sample.device, sample.dtype):
            self.controlnet.to(sample.device, sample.dtype)  # the pipeline was moved after attaching
        down, middle = self.controlnet(
            sample, timestep, encoder_hidden_states=text, controlnet_cond=self._pictures(condition, sample),
            conditioning_scale=self.scale, return_dict=False,
        )  # fmt: skip
        add_residuals(kwargs, down, middle, sample.dtype)
        return args, kwargs

    def _is_on(self, timestep: Any) -> bool:
        clock = self._clock
        restricted = self.start > 0.0 or self.end < 1.0
        return not restricted or in_window(clock.tick(timestep), clock.total, self.start, self.end)

    def _pictures(self, condition: ControlCondition, sample: Tensor) -> Tensor:
        """The condition pictures, one for each sample of the UNet's batch (guidance parts are stacked)."""
        self.check_size(condition.pictures, sample.shape[-2], sample.shape[-1])
        pictures = condition.pictures.to(sample.device, sample.dtype)
        if len(pictures) == 1:
            return pictures.expand(len(sample), -1, -1, -1)
        pictures = pictures.repeat_interleave(condition.images_per_prompt, dim=0)
        if len(sample) % len(pictures):
            raise UserError(
                f"{len(condition.pictures)} control pictures for another number of prompts; give one, or one"
                " for each"
            )
        return pictures.repeat(len(sample) // len(pictures), 1, 1, 1)


class ControlNetKind(PluginKind):
    """A ControlNet's residuals are added to the UNet's."""

    kind = "controlnet"
    sources = ("controlnet",)

    def attach(
        self, path: Path, name: str, strength: float = 1.0, start: float = 0.0, end: float = 1.0
    ) -> Strengths:
        """Hang a ControlNet on the UNet (see ``PluginKind.attach``).

        Args:
            path: file or folder.
            name: of the plug-in.
            strength: factor of the residuals.
            start: share of the steps before which it is off.
            end: share of the steps after which it is off.
        """
        check_window(start, end, "ControlNet")
        unet: Any = self.to.part("unet")
        if unet.device.type == "meta":
            raise UserError("the UNet is offloaded; attach ControlNets before sequential offload is enabled")
        network = load_controlnet(path, unet.dtype).to(unet.device)
        hook = ControlNetHook(network, finite(strength), start, end)
        if (registry := self._registry()).get_hook(_HOOK + name) is not None:  # of a pipeline that is gone
            registry.remove_hook(_HOOK + name, recurse=False)
        hook.attach(unet, _HOOK + name)
        self.to.controlnets[name] = hook
        return {"scale": strength, "start": start, "end": end}

    def detach(self, name: str) -> None:
        """Take a ControlNet off the UNet."""
        self._registry().remove_hook(_HOOK + name, recurse=False)
        del self.to.controlnets[name]

    def strengths(self, name: str, strength: float, text_strength: float | None) -> Strengths:
        """Any finite number, the factor of the residuals."""
        if text_strength is not None:
            raise UserError(f"{name} is a {self.kind}; text_strength has no meaning for it")
        return {"scale": finite(strength)}

    def set_strengths(self, name: str, strengths: Mapping[str, float]) -> None:
        """Multiply the residuals by another factor."""
        self.to.controlnets[name].scale = strengths["scale"]

    @contextmanager
    def during(self, call: PipelineCall) -> Iterator[None]:
        """Every ControlNet sees its picture.

        Raises:
            UserError: a ControlNet without a picture, a picture without a ControlNet or of another size.
        """
        pictures = self._pictures(call.control_images)
        with ExitStack() as stack:
            for name, hook in self.to.controlnets.items():
                if call.latents is not None:
                    hook.check_size(pictures[name], *call.latents)
                condition = ControlCondition(pictures[name], call.steps, call.images_per_prompt)
                stack.enter_context(hook.condition(condition))
            yield

    def _registry(self) -> Any:
        return HookRegistry.check_if_exists_or_initialize(self.to.part("unet"))

    def _pictures(self, given: Any) -> dict[str, Tensor]:
        names = list(self.to.controlnets)
        if given is not None and not isinstance(given, Mapping):
            if len(names) != 1:
                raise UserError(
                    f"one control picture is given for {len(names)} ControlNets; give control_images={{name:"
                    " picture}"
                )
            given = {names[0]: given}
        given = dict(given or {})
        missing, extra = [n for n in names if n not in given], [n for n in given if n not in names]
        if missing or extra:
            what = (
                f"no control picture for {missing[0]!r}"
                if missing
                else f"a control picture for {extra[0]!r}, which is not attached"
            )
            raise UserError(f"{what}; attached ControlNets: {', '.join(names) or 'none'}")
        return {name: control_tensor(pictures) for name, pictures in given.items()}
