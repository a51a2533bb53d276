"""Nearest-neighbour enlargement and the 3x3 convolution behind it, folded into one; the result is the same.

Of an enlarged picture, a 3x3 window holds 2x2 different pixels only, and which ones depends on whether its
row and column are even or odd. So the pair equals four 2x2 convolutions of the small picture, one for each
kind of output pixel: 16 products for every small pixel and pair of channels instead of 36 (sub-pixel
convolution, arXiv 1609.05158).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from .kernels import ConvolutionSettings, convolve, pack_kernel, packed_kernels_work
from .recognise import is_known
from .stand_in import class_of, stand_in
from .watched import end_watch, watch

#: Smaller layers (in operations of the plain convolution) gain less than the four calls cost.
LEAST_FLOPS = 5e9
#: Which rows of a 3x3 kernel fall onto each of the two small rows under it, for even and for odd output rows.
_FALLS_ON = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))
_SETTINGS: ConvolutionSettings = (0, 0), (1, 1), (1, 1), 1


def fold_weight(weight: Tensor) -> list[Tensor]:
    """A 3x3 kernel (O, I, 3, 3) -> four 2x2 kernels (O, I, 2, 2).

    They are for output pixels in (even, even), (even, odd), (odd, even), (odd, odd) rows and columns.
    """
    rows = [torch.tensor(matrix).to(weight) for matrix in _FALLS_ON]
    kernels = [torch.einsum("ad,be,oide->oiab", rows[p], rows[q], weight) for p in (0, 1) for q in (0, 1)]
    return [kernel.contiguous(memory_format=layout_of(weight)) for kernel in kernels]


def layout_of(x: Tensor) -> torch.memory_format:
    """Whether a tensor of four axes has its channels last."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def enlarge_and_convolve(x: Tensor, kernels: list[Tensor], bias: Tensor | None) -> Tensor:
    """Twice as high and wide by nearest neighbour, then convolved with padding 1.

    Args:
        x: (B, I, h, w).
        kernels: from ``fold_weight``, packed or not (see ``bdm.speed.packing``).
        bias: (O,).

    Returns:
        (B, O, 2h, 2w).
    """
    height, width = x.shape[-2:]
    padded = functional.pad(x, (1, 1, 1, 1))
    layout = torch.channels_last if kernels[0].is_mkldnn else layout_of(x)
    shape = (len(x), kernels[0].shape[0], 2 * height, 2 * width)
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    for i, kernel in enumerate(kernels):
        p, q = divmod(i, 2)
        window = padded[:, :, p : p + height + 1, q : q + width + 1]
        result[:, :, p::2, q::2] = convolve(window, kernel, bias, _SETTINGS)
    return result


class FoldedUpsampling:
    """Computes an ``Upsample2D`` folded wherever that is exact and faster, else as its class does.

    Kernels are folded from the live weight when it is first met, and kept until somebody asks for the
    weight's values (see ``bdm.speed.watched``).

    Args:
        pack: keep the kernels in the form that the CPU computes with (see ``bdm.speed.packing``).
    """

    def __init__(self, pack: bool = False) -> None:
        self._pack = pack
        self._kernels: list[Tensor] | None = None
        self._weight: Any = None
        self._gave_up = False

    def __call__(self, module: Any, plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The folded result, or the module's own."""
        x: Any = args[0] if args else kwargs.get("hidden_states")
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        doubled = size is None or tuple(size) == tuple(2 * n for n in x.shape[-2:])
        if not (doubled and len(args) + len(kwargs) <= 2 and self._fits(module, x)):
            return plain(module, *args, **kwargs)
        kernels = self._kernels_for(module.conv, x)
        if kernels is None:
            return plain(module, *args, **kwargs)
        return self.compute(x, kernels, module.conv.bias)

    def may_compute(self, x: Tensor, convolution: nn.Conv2d) -> bool:
        """Whether folded kernels do all that is asked for: nothing that autograd records."""
        return not torch.is_grad_enabled()

    def compute(self, x: Tensor, kernels: list[Tensor], bias: Tensor | None) -> Tensor:
        """The folded result (see ``enlarge_and_convolve``)."""
        return enlarge_and_convolve(x, kernels, bias)

    def undo(self) -> None:
        """Forget the kernels."""
        if self._weight is not None:
            end_watch(self._weight)

    def _kernels_for(self, convolution: Any, x: Tensor) -> list[Tensor] | None:
        weight = convolution._parameters["weight"]
        if self._weight is not None and self._weight is not weight:
            self._forget()  # the layer was given another parameter
        if self._kernels is None and not self._gave_up:
            kernels = self._fold(weight.detach(), x)
            if watch(weight, self._forget):
                self._weight, self._kernels = weight, kernels
            else:
                self._gave_up = True
        return self._kernels

    def _fold(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch.inference_mode(False):
            kernels = fold_weight(weight)
            single = x.dtype == torch.float32 and not torch.is_grad_enabled()
            if self._pack and single and packed_kernels_work():
                shape = torch.Size((*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1))
                kernels = [pack_kernel(kernel, _SETTINGS, shape) for kernel in kernels]
        return kernels

    def _forget(self) -> None:
        """Somebody asks for the weight: what was folded may be old from now on."""
        self._kernels, self._gave_up = None, True

    def _fits(self, module: Any, x: Tensor) -> bool:
        """A plain enlargement by two before a plain 3x3 convolution, large enough to be faster folded."""
        convolution = getattr(module, "conv", None)
        if (
            convolution is None
            or class_of(convolution) is not nn.Conv2d
            or module.norm is not None
            or not module.interpolate
        ):
            return False
        if not _is_plain_3x3(convolution) or not is_known(convolution):
            return False
        weight = convolution._parameters["weight"]
        # Half precision would round the sums of weights, as autocast would.
        exact = weight.device.type == "cpu" and weight.dtype == x.dtype in (torch.float32, torch.float64)
        if not exact or weight.is_inference() or torch.is_autocast_enabled("cpu"):
            return False
        work = 2 * weight.numel() * 4 * x.shape[0] * x.shape[-2] * x.shape[-1]
        return work >= LEAST_FLOPS and not torch.compiler.is_compiling() and self.may_compute(x, convolution)


def _is_plain_3x3(convolution: nn.Conv2d) -> bool:
    shape = (convolution.kernel_size, convolution.padding, convolution.stride, convolution.dilation)
    whole = convolution.groups == 1 and convolution.padding_mode == "zeros"
    # A shape that stands for a GPU's weight (see ``bdm.plan``) is no weight.
    return (
        whole and shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and not isinstance(convolution.weight, FakeTensor)
    )


def fold_layers(
    stack: ExitStack, model: nn.Module, pack: bool = False, kind: type[FoldedUpsampling] = FoldedUpsampling
) -> None:
    """Let the enlargements of a UNet or VAE compute folded until ``stack`` closes.

    Args:
        stack: ends it, and what was folded.
        model: the network.
        pack: see ``FoldedUpsampling``.
        kind: how they compute.
    """
    for module in model.modules():
        if type(module) is Upsample2D and is_known(module):
            compute = kind(pack)
            stack.callback(compute.undo)
            stand_in(stack, module, compute)


class FoldedEnlargements:
    """Folds the enlargements of a backbone for the time of a condition.

    Only for pipelines between whose steps nobody's code runs.
    """

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Fold those of the UNet; the branch has none."""
        fold_layers(stack, unet)

    def before(self, call: Any) -> None:
        """Nothing: the layers see by themselves what they are given."""

    def after(self, output: Any) -> Any:
        """The output as it is."""
        return output
