"""Weights kept in the form that the CPU's kernels compute with, between ``pipe.optimize()`` and ``undo()``.

Rearranging a weight for oneDNN takes as long as the convolution where pictures are small; here it is done
once. Activations go through convolutions with the channels last, which the kernels read fastest and attention
needs anyway. Memory holds every weight once: its parameter has none while it is packed, and whoever asks for
its values finds it whole (see ``bdm.speed.watched``), after which its layer computes as before. Values are
moved, never rounded.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from . import kernels
from .recognise import is_known
from .stand_in import stand_in
from .watched import WatchedParameter, end_watch, watch

logger = logging.getLogger("bdm")

#: Fewer weights gain nothing by being packed: of a convolution, of a linear layer (if it has more than a few
#: rows).
LEAST_CONVOLUTION, LEAST_LINEAR, LEAST_ROWS = 10_000, 1_000_000, 16
#: Ends of the names of layers that read nothing but the text.
TEXT_PROJECTIONS = (".attn2.to_k", ".attn2.to_v")


@dataclass
class PackedWeight:
    """A parameter's values in the kernels' form, while it has none of its own.

    Attributes:
        weight: the parameter.
        packed: its values; None once somebody has asked for them.
        strides: its memory layout.
    """

    weight: nn.Parameter
    packed: Tensor | None
    strides: tuple[int, ...]

    @classmethod
    def of(cls, weight: nn.Parameter, packed: Tensor) -> PackedWeight | None:
        """Take a parameter's memory in exchange for its packed values; None where it cannot be watched."""
        dense = weight.data
        self = cls(weight, packed, dense.stride())
        # NaN shows whoever should come by the watch that these are no weights.
        weight.data = torch.full((), torch.nan, dtype=dense.dtype).expand(dense.shape)
        if not watch(weight, self.unpack):
            weight.data = dense
            return None
        return self

    def is_current(self, weight: Any) -> bool:
        """Whether this is (still) what a layer's weight holds."""
        return self.packed is not None and weight is self.weight and type(weight) is WatchedParameter

    def unpack(self) -> None:
        """Give the parameter its values back, bit for bit and in its memory layout."""
        if self.packed is None:
            return
        # Outside of inference mode, so that the network can still be trained.
        with torch.inference_mode(False), torch.no_grad():
            dense = self.packed.to_dense().view(self.weight.shape)
            if dense.stride() != self.strides:
                dense = dense.new_empty_strided(dense.shape, self.strides).copy_(dense)
            self.packed = None
            with torch._C.DisableTorchFunctionSubclass():
                self.weight.data = dense


class PackedLayer:
    """Computes for a convolution or a linear layer with its packed weight.

    A convolution of single pixels is a linear layer of their channels. Without enough weights to gain by
    packing it multiplies by the weight as it is, which is still several times as fast as calling oneDNN for
    few pixels.
    """

    def __init__(self) -> None:
        self._held: PackedWeight | None = None
        self._gave_up = False

    def __call__(self, layer: Any, plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's result; as its own class computes it where the packed kernels cannot."""
        x = args[0] if args else kwargs["input"]
        if not _can_compute(x):
            return plain(layer, *args, **kwargs)
        weight = layer._parameters["weight"]
        if self._held is not None and not self._held.is_current(weight):
            self._give_up()
        if self._gave_up:
            return plain(layer, *args, **kwargs)
        if isinstance(layer, nn.Linear):
            return self._multiply(layer, weight, x)
        if x.ndim != 4:
            return plain(layer, *args, **kwargs)
        if is_pixelwise(layer):
            x = x.contiguous(memory_format=torch.channels_last).movedim(1, -1)
            return self._multiply(layer, weight, x).movedim(-1, 1)
        settings = kernels.convolution_settings(layer)
        if self._held is None:
            self._hold(weight, kernels.pack_kernel(weight.detach(), settings, x.shape))
        held = self._held
        if held is None or held.packed is None:
            return plain(layer, *args, **kwargs)
        return kernels.convolve(x, held.packed, layer.bias, settings)

    def _multiply(self, layer: Any, weight: Any, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self._held is None:
            matrix = weight.flatten(1)
            if rows < LEAST_ROWS or weight.numel() < LEAST_LINEAR:
                return functional.linear(x, matrix, layer.bias)
            self._hold(weight, kernels.pack_matrix(matrix.detach(), rows))
        held = self._held
        if held is None or held.packed is None:
            return functional.linear(x, weight.flatten(1), layer.bias)
        return kernels.multiply(x, held.packed, layer.bias)

    def _hold(self, weight: nn.Parameter, packed: Tensor) -> None:
        self._held = PackedWeight.of(weight, packed)
        self._gave_up = self._held is None

    def _give_up(self) -> None:
        self._held, self._gave_up = None, True
        logger.debug("a packed weight was asked for; its layer computes as it did before optimize()")

    @property
    def is_packed(self) -> bool:
        """Whether the layer's weight is packed now."""
        return self._held is not None and self._held.packed is not None

    @property
    def bytes(self) -> int:
        """Size of the weight that is packed now."""
        held = self._held
        return (
            held.weight.numel() * held.weight.element_size()
            if held is not None and held.packed is not None
            else 0
        )

    def undo(self) -> None:
        """Give the weight back."""
        if self._held is not None:
            end_watch(self._held.weight)
        self._held = None


def _can_compute(x: Any) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def is_pixelwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of single pixels."""
    settings = ((0, 0), (1, 1), (1, 1), 1)
    return (
        isinstance(layer, nn.Conv2d)
        and kernels.convolution_settings(layer) == settings
        and (layer.kernel_size == (1, 1))
    )


def packable(model: nn.Module) -> list[nn.Module]:
    """The layers of a network that gain, without convolutions behind enlargements (``bdm.speed.folding``)."""
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
        least = 0 if is_pixelwise(module) else LEAST_CONVOLUTION
    elif type(module) is nn.Linear and not name.endswith(
        TEXT_PROJECTIONS
    ):  # those are computed once for a text
        least = LEAST_LINEAR
    else:
        return False
    return is_known(module) and is_ordinary_weight(module.weight) and module.weight.numel() >= least


def is_ordinary_weight(weight: Any) -> bool:
    """Whether a weight is an ordinary parameter in single precision on the CPU."""
    single_on_cpu = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
    return type(weight) is nn.Parameter and single_on_cpu and not weight.is_inference()


def pack_layers(stack: ExitStack, model: nn.Module) -> list[PackedLayer]:
    """Let a network's layers keep their weights packed from their first call on, until ``stack`` closes."""
    packed = []
    for layer in packable(model) if kernels.packed_kernels_work() else ():
        packed.append(compute := PackedLayer())
        stack.callback(compute.undo)
        stand_in(stack, layer, compute)
    return packed
