"""An adapter's change of a layer beside the layer, instead of in its weight.

With W + s B A in place of W a layer gives W x + s B (A x). Added to its output, the change costs two small
products, and each sample of a batch can have a strength of its own (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from ..formats.change import Change
from ..method.hooks import hang_after
from ..speed.stand_in import class_of

#: The factors of changes that are two matrices and nothing else.
_FACTORS = {"up", "down", "alpha", "scalar"}


@dataclass(frozen=True)
class LowRank:
    """Two small layers behind each other: what they give is the change of a layer's output at strength 1.

    Attributes:
        down: (rank, in) or (rank, in, height, width).
        up: (out, rank), what scales the product in it.
        window: stride, padding and dilation of a convolution; None for a linear layer.
    """

    down: Tensor
    up: Tensor
    window: tuple[Any, Any, Any] | None

    def __call__(self, x: Tensor) -> Tensor:
        """The change for a layer's input (B, ..., in), or (B, in, height, width) of a convolution."""
        if self.window is None:
            return functional.linear(functional.linear(x, self.down), self.up)
        inside = functional.conv2d(x, self.down, None, *self.window)
        return functional.conv2d(inside, self.up[:, :, None, None])


def low_rank_changes(network: nn.Module, changes: Mapping[str, Change]) -> dict[str, LowRank] | None:
    """An adapter's changes of a network beside its layers.

    Args:
        network: whose modules they are.
        changes: by module.

    Returns:
        By module; None where some change is more than two matrices (a bias, a norm, a Kronecker product,
        another length of rows), or of a layer that may be computed in another way than its class's, or not in
        single precision: rounded to half, a weight with its change in it is another one.
    """
    modules = dict(network.named_modules())
    folded = {id(module.conv) for module in modules.values() if isinstance(module, Upsample2D)}
    found = {}
    for name, change in changes.items():
        layer = modules.get(name)  # under another name where somebody wraps it
        one = None if layer is None or id(layer) in folded else _low_rank(layer, change)
        if one is None:
            return None
        found[name] = one
    return found


def _low_rank(layer: Any, change: Change) -> LowRank | None:
    factors, kind = change.factors, class_of(layer)
    if kind not in (nn.Linear, nn.Conv2d) or not {"up", "down"} <= factors.keys() <= _FACTORS:
        return None
    weight = layer._parameters["weight"]
    outputs, *inputs = weight.shape
    up, down = (factors[name].to(weight.device, torch.float32) for name in ("up", "down"))
    up = up.flatten(1)
    sizes = (up.shape[0], down.flatten(1).shape[1], up.shape[1])
    if weight.dtype != torch.float32 or sizes != (outputs, math.prod(inputs), len(down)):
        return None
    up = up * (change.multiplier * (factors["scalar"].item() if "scalar" in factors else 1.0))
    window = None
    if kind is nn.Conv2d:
        if layer.groups != 1 or layer.padding_mode != "zeros":
            return None
        window = (layer.stride, layer.padding, layer.dilation)
    return LowRank(down.reshape(len(down), *inputs), up, window)


#: Gives strengths for the samples of an input: (B,), one number for all, or None for 0.
Strength = Callable[[Tensor], Any]


def hang_low_rank(stack: ExitStack, layer: nn.Module, change: LowRank, strength: Strength) -> None:
    """Add a change to a layer's output, at the strengths that are asked for in each call.

    Args:
        stack: takes it off when it closes.
        layer: that it is of.
        change: at strength 1.
        strength: see above.
    """

    def added(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        each = strength(x)
        if each is None:
            return None
        if isinstance(each, Tensor):
            each = each.reshape(-1, *[1] * (output.ndim - 1))
        return output + change(x) * each

    hang_after(stack, layer, added)
