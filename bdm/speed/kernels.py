"""oneDNN's kernels on packed weights: PyTorch's private operators, tried before they are relied on.

PyTorch stores a convolution's weight as (O, I, kh, kw) and oneDNN computes with blocks of channels, so every
call of an ordinary layer rearranges its weight first. These operators take a weight that has been rearranged
once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: A convolution's padding, stride, dilation and groups.
ConvolutionSettings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def convolution_settings(convolution: nn.Conv2d) -> ConvolutionSettings:
    """The settings of a layer whose padding is given in numbers."""
    settings: Any = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
    return settings


def pack_kernel(weight: Tensor, settings: ConvolutionSettings, shape: torch.Size) -> Tensor:
    """A convolution's weight (O, I, kh, kw) in blocks chosen for ``shape``; other inputs give the same."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(shape))


def pack_matrix(weight: Tensor, rows: int) -> Tensor:
    """A linear layer's weight (O, I) in blocks chosen for ``rows`` rows; others give the same."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, settings: ConvolutionSettings) -> Tensor:
    """Convolve (B, I, h, w) with a kernel that is packed or not; a packed one gives channels last."""
    if not kernel.is_mkldnn:
        padding, stride, dilation, groups = settings
        return functional.conv2d(x, kernel, bias, stride, padding, dilation, groups)  # pyright: ignore
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *settings, "none", [], "")


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply (..., I) by a packed matrix of a linear layer."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


@cache
def packed_kernels_work() -> bool:
    """Whether all of these operators are there and give what ordinary layers give, tried on small ones."""
    if not torch.backends.mkldnn.enabled:
        return False
    try:
        with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            return _convolution_works() and _linear_works()
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


def _convolution_works() -> bool:
    layer, x = nn.Conv2d(16, 8, 3, padding=1, stride=2), torch.linspace(-1, 1, 2 * 16 * 36).view(2, 16, 6, 6)
    settings = convolution_settings(layer)
    kernel = pack_kernel(layer.weight, settings, x.shape)
    result = convolve(x, kernel, layer.bias, settings)
    whole = torch.equal(kernel.to_dense().view(layer.weight.shape), layer.weight)
    return kernel.is_mkldnn and whole and torch.allclose(result, layer(x), atol=1e-5)


def _linear_works() -> bool:
    layer, x = nn.Linear(24, 16), torch.linspace(-1, 1, 20 * 24).view(20, 24)
    matrix = pack_matrix(layer.weight, len(x))
    whole = torch.equal(matrix.to_dense().view(layer.weight.shape), layer.weight)
    return whole and torch.allclose(multiply(x, matrix, layer.bias), layer(x), atol=1e-5)
