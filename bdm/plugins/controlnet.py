"""ControlNets on the backbone, beside the branch: a hook on the UNet, as the bridge is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, quoted
from ..formats.checkpoint import load_controlnet
from ..method.clock import check_window
from .control_images import annotate as annotate
from .control_images import canny_edges as canny_edges
from .control_images import control_tensor as control_tensor
from .control_images import open_picture as open_picture
from .controlnet_hook import ControlCondition as ControlCondition
from .controlnet_hook import ControlNetHook as ControlNetHook
from .kind import PipelineCall, PluginKind, Strengths, finite

#: What a ControlNet can compute in.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ControlNetKind(PluginKind):
    """A ControlNet's residuals are added to the UNet's."""

    kind = "controlnet"
    sources = ("controlnet",)

    def attach(
        self,
        path: Path,
        name: str,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        pooled: bool | None = None,
    ) -> Strengths:
        """Hang a ControlNet on the UNet (see ``PluginKind.attach``).

        To a file of differences the weights of the pipeline's own UNet are added, without other plug-ins.

        Args:
            path: file or folder.
            name: of the plug-in.
            strength: factor of the residuals.
            start: share of the steps before which it is off.
            end: share of the steps after which it is off.
            pooled: average the residuals over the picture and leave negative prompts alone, as the shuffle
                ControlNet was trained; must be said of a file or folder that tells it is one.
        """
        settings = control_settings(strength, start, end)
        unet: Any = self.to.part("unet")
        if unet.device.type == "meta":
            raise UserError("the UNet is offloaded; attach ControlNets before sequential offload is enabled")
        dtype = unet.dtype if unet.dtype in _DTYPES else torch.float32  # weights may be kept in fewer bits
        network = load_controlnet(path, dtype, backbone=self._backbone).to(unet.device)
        _settle_pooling(network, pooled, path)
        self.to.hang(name, ControlNetHook(network, **settings))
        return settings

    def _backbone(self) -> dict[str, Tensor]:
        self.to.weights.check("unet")
        return self.to.weights.base("unet")

    def detach(self, name: str) -> None:
        """Take a ControlNet off the UNet."""
        self.to.take_off(name)

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
        hooks = self.to.controlnets if call.controlnets is None else call.controlnets
        pictures = _pictures(call.control_images, list(hooks))
        with ExitStack() as stack:
            for name, hook in hooks.items():
                if call.latents is not None:
                    hook.check_size(pictures[name], *call.latents)
                condition = ControlCondition(
                    pictures[name], call.steps, call.images_per_prompt, call.samples, call.parts
                )
                stack.enter_context(hook.condition(condition))
            yield


def control_settings(strength: Any, start: Any = 0.0, end: Any = 1.0) -> Strengths:
    """A ControlNet's strength and window as ``ControlNetHook`` takes them.

    Raises:
        UserError: one is no finite number, or the window is none.
    """
    start, end = finite(start, "start"), finite(end, "end")
    check_window(start, end, "ControlNet")
    return {"scale": finite(strength), "start": start, "end": end}


def _pictures(given: Any, names: list[str]) -> dict[str, Tensor]:
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


def _settle_pooling(network: Any, pooled: bool | None, path: Path) -> None:
    """Let a ControlNet pool its residuals, or not, as it was said.

    Raises:
        UserError: it was not said of one that is made to pool them: most have no other sign than their name.
    """
    if pooled is not None and not isinstance(pooled, bool):
        raise UserError(f"pooled is {quoted(pooled)}; give True or False, or leave it out")
    if pooled is None and network.config["global_pool_conditions"]:
        raise UserError(
            f"{path} is a shuffle ControlNet, whose residuals are averaged over the picture: its"
            " configuration (global_pool_conditions), a yaml beside it or its name says so; attach it with"
            " pooled=True, or with pooled=False if it is none"
        )
    if pooled is not None:
        network.register_to_config(global_pool_conditions=pooled)
