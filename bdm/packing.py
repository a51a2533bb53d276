"""Convolution weights kept, for the time of a call, in the form that the CPU's kernels compute with.

PyTorch stores a convolution's weight as (O, I, kh, kw) and oneDNN computes with blocks of channels, so every call of an ordinary
layer rearranges its weight first; where pictures are small that takes as long as the convolution. Here it is done at the first
step and undone after the last. Memory holds every weight once, in one form or the other, and values are moved, never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

HOOK_NAME = "bdm.packing"
#: Convolutions of fewer channels (latents) or of single pixels (products of matrices) gain nothing.
LEAST_CHANNELS, LEAST_KERNEL = 32, 3


class PackedConvolution(ModelHook):
    """Runs a convolution on its packed weight; the module's parameter is empty meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._packed: Tensor | None = None
        self._strides: tuple[int, ...] = ()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The convolution, packing its weight first if that has not been done; as it is where gradients are wanted."""
        convolution: Any = module
        x = args[0] if args else kwargs["input"]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (x.dtype, x.device.type) != (torch.float32, "cpu"):
            self.unpack(convolution)
            plain: Any = self.fn_ref.original_forward
            return plain(x)
        settings = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        if self._packed is None:
            weight = convolution.weight.data
            # Blocks are chosen for inputs like this one; with others the result is the same.
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x.shape))
            self._strides = weight.stride()
            convolution.weight.data = weight.new_empty(0)
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, convolution.bias, *settings, "none", [], "")

    def unpack(self, convolution: Any) -> None:
        """Give the parameter its weight back, bit for bit and in its memory layout."""
        if self._packed is not None:
            dense = self._packed.to_dense()
            if dense.stride() != self._strides:
                dense = dense.new_empty_strided(dense.shape, self._strides).copy_(dense)
            convolution.weight.data, self._packed = dense, None


def packable(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a network that gain, but for those behind enlargements (see ``bdm.folding``)."""
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return []
    folded = {id(module.conv) for module in model.modules() if isinstance(module, Upsample2D) and hasattr(module, "conv")}
    return [
        module
        for module in model.modules()
        if type(module) is nn.Conv2d
        and id(module) not in folded
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
        and min(module.kernel_size) >= LEAST_KERNEL
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        # An offloaded weight comes and goes with a hook of its own.
        and not hasattr(module, "_hf_hook")
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and not module.weight.is_inference()
    ]


@contextmanager
def packed_convolutions(*models: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, convolutions keep their weights packed from their first call on."""
    with ExitStack() as stack:
        for convolution in [found for model in models for found in packable(model)]:
            hook = PackedConvolution()
            registry = HookRegistry.check_if_exists_or_initialize(convolution)
            registry.register_hook(hook, HOOK_NAME)
            stack.callback(registry.remove_hook, HOOK_NAME, recurse=False)
            stack.callback(hook.unpack, convolution)
        yield


def unpack_convolutions(model: nn.Module) -> None:
    """Give a network its weights back because they are to be read or changed; they are packed again at their next call."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook(HOOK_NAME) if registry is not None else None
        if isinstance(hook, PackedConvolution):
            hook.unpack(module)
