"""What a frozen network keeps for the backward pass: no more than the gradients of its inputs need.

The branch learns through the backbone's frozen decoder. PyTorch keeps the input of every convolution there as
if its weight were to be trained, and of a normalization with its activation three tensors of which one is
enough. Here a frozen convolution keeps nothing but its weight, and a normalization with SiLU, or a gate with
GELU, its input alone, from which it is worked out again: elementwise work, which costs little. On the CPU,
enlargements run folded as in drawing (see ``bdm.speed.folding``), for which their folded kernels are kept as
well. Gradients are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .folding import FoldedUpsampling, enlarge_and_convolve, fold_layers, layout_of
from .recognise import is_known
from .stand_in import stand_in

#: Of inputs with fewer values, less is saved than a call takes: small networks would train more slowly.
LEAST_VALUES = 600_000


class _InputGradient(torch.autograd.Function):
    """A convolution whose backward pass gives its input's gradient only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input = (x.shape, x.dtype)
        ctx.settings = settings
        return functional.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (shape, dtype) = ctx.saved_tensors, ctx.input
        stride, padding, dilation, groups = ctx.settings
        gradient = gradients[0]
        # Under autocast the product was made in a lower precision than weights are kept in, and so is its
        # gradient.
        weight = weight.to(gradient.dtype)
        placeholder = gradient.new_empty(1).expand(shape)  # of the input, only the shape is asked for
        found = torch.ops.aten.convolution_backward(
            gradient,
            placeholder,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            groups,
            (True, False, False),
        )[0]
        return found.to(dtype), None, None, None


def _convolve_frozen(layer: Any, plain: Any, x: Tensor) -> Tensor:
    """A convolution of which nothing of the input is kept, while its parameters are frozen."""
    if not _keeps_too_much(x) or any(p.requires_grad for p in layer.parameters()):  # such as an adapter's
        return plain(layer, x)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _InputGradient.apply(x, layer.weight, layer.bias, settings)


class _FoldedInputGradient(torch.autograd.Function):
    """An enlargement and its convolution as one, whose backward pass gives its input's gradient only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(*kernels)
        return enlarge_and_convolve(x, list(kernels), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels, gradient = ctx.saved_tensors, gradients[0]
        height, width = gradient.shape[-2] // 2, gradient.shape[-1] // 2
        shape = (len(gradient), kernels[0].shape[1], height + 2, width + 2)
        padded = gradient.new_zeros(shape).contiguous(memory_format=layout_of(gradient))
        for i, kernel in enumerate(kernels):
            p, q = divmod(i, 2)
            window = padded[:, :, p : p + height + 1, q : q + width + 1]
            window += functional.conv_transpose2d(gradient[:, :, p::2, q::2], kernel)
        return padded[:, :, 1:-1, 1:-1], None, *(None for _ in kernels)


class FrozenUpsampling(FoldedUpsampling):
    """Runs a frozen enlargement folded in training, with nothing of its input kept."""

    def may_compute(self, x: Tensor, convolution: nn.Conv2d) -> bool:
        """Whether nothing but the input's gradient is wanted, in the precision that the weight has."""
        frozen = not any(p.requires_grad for p in convolution.parameters())
        return _is_recorded(x) and frozen and not torch.is_autocast_enabled(x.device.type)

    def compute(self, x: Tensor, kernels: list[Tensor], bias: Tensor | None) -> Tensor:
        """The folded result (see ``bdm.speed.folding.enlarge_and_convolve``)."""
        return _FoldedInputGradient.apply(x, bias, *kernels)


class _ActivatedNorms:
    """The normalisations of a residual block, each with its SiLU as one, keeping the input alone."""

    def __init__(self) -> None:
        self._done: Tensor | None = None

    def normalise(self, layer: Any, plain: Any, x: Tensor) -> Tensor:
        """The activated result, which the activation itself then lets pass."""
        if not _keeps_too_much(x):
            return plain(layer, x)
        done = self._done = _recomputed(lambda value: functional.silu(plain(layer, value)), x)
        return done

    def activate(self, layer: Any, plain: Any, x: Tensor) -> Tensor:
        """The tensor itself where it has been activated already."""
        done, self._done = self._done, None
        return done if done is not None and x is done else plain(layer, x)


def _gate_frugally(layer: Any, plain: Any, x: Tensor, *rest: Any, **others: Any) -> Tensor:
    """A GEGLU of which only the projection is kept."""
    if rest or others or not _keeps_too_much(x):
        return plain(layer, x, *rest, **others)

    def gated(projected: Tensor) -> Tensor:
        values, gate = projected.chunk(2, dim=-1)
        return values * layer.gelu(gate)

    return _recomputed(gated, layer.proj(x))


def _keeps_too_much(x: Tensor) -> bool:
    """Whether autograd would keep enough of this to be worth the calls."""
    return x.numel() >= LEAST_VALUES and _is_recorded(x)


def _is_recorded(x: Tensor) -> bool:
    """Whether autograd records this; compilers see to what is kept themselves."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def _recomputed(function: Any, x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def lean_backward(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, a UNet's frozen layers keep no more for the backward pass than needed.

    What is needed are the gradients of their inputs. Layers that something else is on are left alone.
    """
    with ExitStack() as stack:
        for module in list(model.modules()):
            if not is_known(module):
                continue
            if (
                type(module) is nn.Conv2d
                and module.padding_mode == "zeros"
                and module.padding not in _BY_NAME
            ):
                stand_in(stack, module, _convolve_frozen)
            elif type(module) is GEGLU:
                stand_in(stack, module, _gate_frugally)
            elif type(module) is ResnetBlock2D and _activates_norms(module):
                norms = _ActivatedNorms()
                stand_in(stack, module.norm1, norms.normalise)
                stand_in(stack, module.norm2, norms.normalise)
                stand_in(stack, module.nonlinearity, norms.activate)
        fold_layers(stack, model, kind=FrozenUpsampling)
        yield


#: Paddings that PyTorch works out itself.
_BY_NAME = ("same", "valid")


def _activates_norms(block: ResnetBlock2D) -> bool:
    """Whether each normalisation is followed by a SiLU of the block's own at once."""
    layers = (block.norm1, block.norm2, block.nonlinearity)
    kinds = tuple(map(type, layers))
    stock = kinds == (nn.GroupNorm, nn.GroupNorm, nn.SiLU) and all(map(is_known, layers))
    return stock and block.time_embedding_norm == "default"
