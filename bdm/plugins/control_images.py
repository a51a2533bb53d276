"""The pictures that ControlNets are conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, first_line
from ..extras import import_extra


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
