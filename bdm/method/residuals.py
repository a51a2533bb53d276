"""What a side network (the branch, a ControlNet) hands to the UNet.

One tensor for each skip connection and one for the middle block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def check_fit(side: Any, unet: Any, keys: Sequence[str], what: str) -> None:
    """Refuse a side network that is not built as its UNet's encoder is.

    Args:
        side: the branch or a ControlNet.
        unet: the backbone's.
        keys: settings that must be equal; one number stands for as many as there are blocks.
        what: what the side network is called in the message.

    Raises:
        UserError: names the first setting that differs.
    """
    blocks = len(unet.config["block_out_channels"])
    for key in keys:
        ours, theirs = side.config[key], unet.config[key]
        each = [(value,) * blocks if isinstance(value, int) else tuple(value) for value in (ours, theirs)]
        if each[0] != each[1]:
            raise UserError(
                f"the {what}'s {key} {ours} does not fit the backbone's {theirs}; use a {what} made for this"
                " backbone"
            )


def scaled(residual: Tensor, scale: float | Tensor) -> Tensor:
    """A residual times one factor, or one for each sample."""
    if not isinstance(scale, Tensor) or not scale.ndim:
        return residual * scale
    # A factor may be more exact than the residual, as a number is.
    return (residual * scale.view(-1, 1, 1, 1)).to(residual.dtype)


def add_residuals(values: dict[str, Any], down: Sequence[Tensor], middle: Tensor, dtype: torch.dtype) -> None:
    """Put a side network's residuals among the arguments of a UNet's forward pass, added to those of others.

    Args:
        values: the arguments by name.
        down: one tensor for each skip connection, of its shape.
        middle: of the middle block's shape.
        dtype: what the UNet computes in.
    """
    given_down = values.get("down_block_additional_residuals")
    given_middle = values.get("mid_block_additional_residual")
    if given_down is not None and given_middle is not None:
        down = [ours + theirs for ours, theirs in zip(down, given_down, strict=True)]
        middle = middle + given_middle
    elif given_down is not None:
        # Without a middle they are a T2I-adapter's in its old form, which the UNet reads as these.
        values["down_intrablock_additional_residuals"] = given_down
    values["down_block_additional_residuals"] = tuple(residual.to(dtype) for residual in down)
    values["mid_block_additional_residual"] = middle.to(dtype)
