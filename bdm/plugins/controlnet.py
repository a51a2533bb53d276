"""ControlNets on the backbone, beside the branch: a hook on the UNet, as the bridge is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from PIL import Image
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..extras import import_extra
from ..method.bridge import add_residuals, check_fit, in_window


def canny_edges(picture: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """The white-on-black edge picture that Canny ControlNets are conditioned on.

    Thresholds as in ControlNet's own annotator.
    """
    cv2 = import_extra("the annotator canny")
    edges = cv2.Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")


def annotate(picture: Image.Image, name: str | None) -> Image.Image:
    """Turn a picture into a ControlNet's condition.

    Args:
        picture: any picture.
        name: "canny", or the name of a detector of the ``controlnet_aux`` package ("hed", "openpose" ...);
            None leaves it.

    Raises:
        UserError: unknown name, or ``controlnet_aux`` is not installed.
    """
    if name is None:
        return picture
    if name == "canny":
        return canny_edges(picture)
    processor = import_extra("an annotator other than canny", "processor").Processor
    try:
        return processor(name)(picture, to_pil=True).resize(picture.size)
    except (KeyError, ValueError) as error:
        raise UserError(f"controlnet_aux has no annotator {name!r} ({str(error)[:120]})") from None


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture file.

    Raises:
        UserError: missing or not a picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.copy()
    except (
        Exception
    ) as error:  # damaged files make PIL raise SyntaxError, ValueError, struct.error and others
        raise UserError(
            f"{path} is not a picture that can be opened ({first_line(error)}); give a PNG or JPEG"
        ) from None


def control_tensor(pictures: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """Condition pictures as (n, 3, H, W) in [0, 1].

    Raises:
        UserError: modes other than RGB and grey, pictures of different sizes, or a tensor of other values.
    """
    if isinstance(pictures, Tensor):
        _check_control_tensor(pictures)
        return pictures
    pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise UserError("control pictures must be PIL pictures or one tensor; give at least one")
    for picture in pictures:
        if picture.mode not in ("RGB", "L", "1"):
            raise UserError(
                f"a control picture has mode {picture.mode}; give RGB or grey (convert it without"
                " transparency first)"
            )
        if picture.size != pictures[0].size:
            raise UserError(
                f"control pictures of different sizes, {pictures[0].size} and {picture.size}; give one size"
            )
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _check_control_tensor(pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.numel():
        raise UserError(
            f"control pictures have shape {tuple(pictures.shape)}; give (n, 3, height, width) in [0, 1]"
        )
    if not pictures.is_floating_point():
        raise UserError(
            f"control pictures are {pictures.dtype}; give floating-point values in [0, 1], such as pictures"
            " / 255"
        )
    least, most = pictures.min().item(), pictures.max().item()
    if not (least >= 0 and most <= 1):  # NaN is neither
        raise UserError(f"control pictures hold values from {least:g} to {most:g}; give values in [0, 1]")


@dataclass(frozen=True)
class ControlCondition:
    """What a ControlNet is told during one call of a pipeline.

    Attributes:
        pictures: (k, 3, H, W) in [0, 1]; one for all prompts, or one for each.
        steps: gives the number of steps T once the pipeline knows it.
        images_per_prompt: consecutive samples that share a prompt.
    """

    pictures: Tensor
    steps: Callable[[], int]
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
        self._calls = 0

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
        self._condition, self._calls = condition, 0
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
        step, self._calls = self._calls, self._calls + 1
        if self.scale == 0.0 or not in_window(step, self.start, self.end, condition.steps):
            return args, kwargs
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, text = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names))
        if (self.controlnet.device, self.controlnet.dtype) != (sample.device, sample.dtype):
            self.controlnet.to(sample.device, sample.dtype)  # the pipeline was moved after attaching
        down, middle = self.controlnet(
            sample, timestep, encoder_hidden_states=text, controlnet_cond=self._pictures(condition, sample),
            conditioning_scale=self.scale, return_dict=False,
        )  # fmt: skip
        add_residuals(kwargs, down, middle, sample.dtype)
        return args, kwargs

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
