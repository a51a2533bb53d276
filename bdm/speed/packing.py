"""Weights kept, for the time of a call or until they are asked for, in the form that the CPU's kernels
compute with.

PyTorch stores a convolution's weight as (O, I, kh, kw) and oneDNN computes with blocks of channels, so every
call of an ordinary layer rearranges its weight first; where pictures are small that takes as long as the
convolution. Here it is done at the first step. Activations go through convolutions with the channels last,
which the kernels read fastest and attention needs anyway. Memory holds every weight once, in one form or the
other, and values are moved, never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from .sharing import TEXT_PROJECTIONS

HOOK_NAME = "bdm.speed.packing"
#: Fewer weights gain nothing by being packed: of a convolution, of a linear layer (if it has more than a few
#: rows to multiply).
LEAST_CONVOLUTION, LEAST_LINEAR, LEAST_ROWS = 10_000, 1_000_000, 16

#: A convolution's padding, stride, dilation and groups.
ConvolutionSettings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def can_compute_packed(x: Tensor) -> bool:
    """Whether packed kernels may run: single precision on the CPU, no gradient wanted, not being compiled."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (x.dtype, x.device.type) == (torch.float32, "cpu")
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def pack_kernel(weight: Tensor, settings: ConvolutionSettings, shape: torch.Size) -> Tensor:
    """A convolution's weight (O, I, kh, kw) in blocks chosen for inputs of ``shape``.

    With others the result is the same.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(shape))


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, settings: ConvolutionSettings) -> Tensor:
    """Convolve (B, I, h, w) with a kernel that is packed or not.

    With a packed one the result has its channels last.
    """
    if not kernel.is_mkldnn:
        return functional.conv2d(x, kernel, bias, settings[1], settings[0], settings[2], settings[3])  # pyright: ignore
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *settings, "none", [], "")


class PackedLayer(ModelHook):
    """Runs a convolution or a linear layer on its packed weight; the module's parameter is empty meanwhile.

    A convolution of single pixels is a linear layer of their channels. Without enough weights to gain by
    packing it multiplies by the weight as it is, which is still several times as fast as calling oneDNN for
    few pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: Tensor | None = None
        self._shape, self._strides = torch.Size(), ()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's result, packing its weight first if that has not been done.

        As it is where that is not possible.
        """
        layer: Any = module
        x = args[0] if args else kwargs["input"]
        if can_compute_packed(x):
            if isinstance(layer, nn.Linear):
                return self._multiply(layer, x)
            if x.ndim == 4 and _is_pixelwise(layer):
                x = x.contiguous(memory_format=torch.channels_last).movedim(1, -1)
                return self._multiply(layer, x).movedim(-1, 1)
            if x.ndim == 4:
                return self._convolve(layer, x)
        self.unpack(layer)
        plain: Any = self.fn_ref.original_forward
        return plain(x)

    def _convolve(self, layer: Any, x: Tensor) -> Tensor:
        if self._packed is None:
            self._pack(layer, pack_kernel(layer.weight.data, _settings(layer), x.shape))
        return convolve(x, self._packed, layer.bias, _settings(layer))  # pyright: ignore[reportArgumentType]

    def _multiply(self, layer: Any, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self._packed is None:
            weight = layer.weight.data.flatten(1)
            if rows < LEAST_ROWS or weight.numel() < LEAST_LINEAR:
                return functional.linear(x, weight, layer.bias)
            self._pack(layer, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, layer.bias, "none", [], "")

    def _pack(self, layer: Any, packed: Tensor) -> None:
        weight = layer.weight.data
        self._packed, self._shape, self._strides = packed, weight.shape, weight.stride()
        layer.weight.data = weight.new_empty(0)

    def unpack(self, layer: Any) -> None:
        """Give the parameter its weight back, bit for bit and in its memory layout, wherever the model has
        been moved meanwhile.
        """
        if self._packed is not None:
            dense = self._packed.to_dense().view(self._shape)
            if dense.stride() != self._strides:
                dense = dense.new_empty_strided(dense.shape, self._strides).copy_(dense)
            layer.weight.data, self._packed = dense.to(layer.weight), None


def _is_pixelwise(layer: nn.Module) -> bool:
    settings = ((0, 0), (1, 1), (1, 1), 1)
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and _settings(layer) == settings


def _settings(convolution: nn.Conv2d) -> ConvolutionSettings:
    return (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)  # pyright: ignore


def packable(model: nn.Module) -> list[nn.Module]:
    """The layers of a network that gain, but for convolutions behind enlargements (see
    ``bdm.speed.folding``).
    """
    folded = {
        id(module.conv)
        for module in model.modules()
        if isinstance(module, Upsample2D) and hasattr(module, "conv")
    }
    return [
        module for name, module in model.named_modules() if _gains(name, module) and id(module) not in folded
    ]


def _gains(name: str, module: nn.Module) -> bool:
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        least = 0 if _is_pixelwise(module) else LEAST_CONVOLUTION
    elif type(module) is nn.Linear and not name.endswith(
        TEXT_PROJECTIONS
    ):  # those are computed once for a text
        least = LEAST_LINEAR
    else:
        return False
    weight: Any = module.weight
    single_on_cpu = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    # An offloaded weight comes and goes with a hook of its own.
    return (
        single_on_cpu
        and weight.numel() >= least
        and not hasattr(module, "_hf_hook")
        and not weight.is_inference()
    )


@contextmanager
def packed_layers(*models: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, layers keep their weights packed from their first call on, until something
    asks for them.

    A model inside another such block stays in that one's care.
    """
    with ExitStack() as stack:
        for model in models:
            for reading in (model.register_state_dict_pre_hook, model.register_load_state_dict_pre_hook):
                stack.callback(reading(lambda module, *_: unpack_layers(module)).remove)
            for layer in packable(model):
                hook = PackedLayer()
                if hang_hook(stack, layer, hook, HOOK_NAME):
                    stack.callback(hook.unpack, layer)
        yield


def hang_hook(stack: ExitStack, module: nn.Module, hook: ModelHook, name: str) -> bool:
    """Hook a module until ``stack`` closes.

    False and nothing done where a hook of that name is there already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(name) is not None:
        return False
    registry.register_hook(hook, name)
    stack.callback(registry.remove_hook, name, recurse=False)
    return True


def unpack_layers(model: nn.Module) -> None:
    """Give a network its weights back because they are to be read or changed.

    They are packed again at their next call.
    """
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook(HOOK_NAME) if registry is not None else None
        if isinstance(hook, PackedLayer):
            hook.unpack(module)
