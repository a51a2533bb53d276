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
from diffusers.hooks import ModelHook
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .folding import FoldedUpsampling, enlarge_and_convolve, layout_of
from .packing import hang_hook

HOOK_NAME = "bdm.speed.lean_backward"
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


class FrozenConvolution(ModelHook):
    """Runs a convolution so that nothing of its input is kept, while its parameters are frozen."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The convolution's result."""
        layer: Any = module
        x = args[0] if args else kwargs["input"]
        if not _keeps_too_much(x) or any(p.requires_grad for p in layer.parameters()):  # such as an adapter's
            plain: Any = self.fn_ref.original_forward
            return plain(x)
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


class _Activated:
    """The last result of a normalization that has its activation in it already."""

    value: Tensor | None = None


class RecomputedNorm(ModelHook):
    """Runs a normalization and the SiLU behind it as one, keeping its input alone."""

    def __init__(self, activated: _Activated) -> None:
        super().__init__()
        self._activated = activated

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The activated result, which the activation's own hook then lets pass."""
        plain: Any = self.fn_ref.original_forward
        if not _keeps_too_much(args[0]):
            return plain(*args, **kwargs)
        self._activated.value = _recomputed(lambda x: functional.silu(plain(x)), args[0])
        return self._activated.value


class PassActivated(ModelHook):
    """Lets a tensor pass that has been activated already."""

    def __init__(self, activated: _Activated) -> None:
        super().__init__()
        self._activated = activated

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The tensor itself, or its activation."""
        done, self._activated.value = self._activated.value, None
        plain: Any = self.fn_ref.original_forward
        return done if done is not None and args[0] is done else plain(*args, **kwargs)


class RecomputedGate(ModelHook):
    """Runs a GEGLU so that only its projection is kept."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The gated values."""
        layer: Any = module
        plain: Any = self.fn_ref.original_forward
        if not _keeps_too_much(args[0]):
            return plain(*args, **kwargs)

        def gated(projected: Tensor) -> Tensor:
            values, gate = projected.chunk(2, dim=-1)
            return values * layer.gelu(gate)

        return _recomputed(gated, layer.proj(args[0]))


def _keeps_too_much(x: Tensor) -> bool:
    """Whether autograd would keep enough of this to be worth the calls."""
    return x.numel() >= LEAST_VALUES and _is_recorded(x)


def _is_recorded(x: Tensor) -> bool:
    """Whether autograd records this; compilers see to what is kept themselves."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def _recomputed(function: Any, x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def frugal_backward(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, a UNet's frozen layers keep no more for the backward pass than their inputs'
    gradients need.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if (
                type(module) is nn.Conv2d
                and module.padding_mode == "zeros"
                and not isinstance(module.padding, str)
            ):
                hang_hook(stack, module, FrozenConvolution(), HOOK_NAME)
            elif isinstance(module, Upsample2D):
                hang_hook(stack, module, FrozenUpsampling(), HOOK_NAME)
            elif isinstance(module, GEGLU):
                hang_hook(stack, module, RecomputedGate(), HOOK_NAME)
            elif isinstance(module, ResnetBlock2D) and _activates_norms(module):
                activated = _Activated()
                for norm in (module.norm1, module.norm2):
                    hang_hook(stack, norm, RecomputedNorm(activated), HOOK_NAME)
                hang_hook(stack, module.nonlinearity, PassActivated(activated), HOOK_NAME)
        yield


def _activates_norms(block: ResnetBlock2D) -> bool:
    """Whether each normalization is followed by a SiLU at once."""
    return isinstance(block.nonlinearity, nn.SiLU) and block.time_embedding_norm == "default"
