"""Nearest-neighbour enlargement and the 3x3 convolution behind it, folded into one; the result is the same.

Of an enlarged picture, a 3x3 window holds 2x2 different pixels only, and which ones depends on whether its
row and column are even or odd. So the pair equals four 2x2 convolutions of the small picture, one for each
kind of output pixel: 16 products for every small pixel and pair of channels instead of 36 (sub-pixel
convolution, arXiv 1609.05158).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from .packing import ConvolutionSettings, can_compute_packed, convolve, hang_hook, pack_kernel, packed_layers
from .sharing import Snapshot

HOOK_NAME = "bdm.speed.folding"
#: Smaller layers (in operations of the plain convolution) gain less than the four calls cost.
LEAST_FLOPS = 5e9
#: Which rows of a 3x3 kernel fall onto each of the two small rows under it, for even and for odd output rows.
_FALLS_ON = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))
_SETTINGS: ConvolutionSettings = (0, 0), (1, 1), (1, 1), 1


def fold_weight(weight: Tensor) -> list[Tensor]:
    """A 3x3 kernel (O, I, 3, 3) -> four 2x2 kernels, for output pixels (even, even), (even, odd), (odd,
    even), (odd, odd).
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


class FoldedUpsampling(ModelHook):
    """Runs an ``Upsample2D`` folded wherever that is exact and faster, else as it is.

    Kernels are folded from the live weight when it is first met, so adapters and swapped checkpoints count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folded: tuple[Snapshot, list[Tensor]] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The folded result, or the module's own."""
        x: Any = args[0] if args else kwargs.get("hidden_states")
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        convolution = getattr(module, "conv", None)
        if not (
            self._fits(module, convolution, x)
            and (size is None or tuple(size) == tuple(2 * n for n in x.shape[-2:]))
        ):
            plain: Any = self.fn_ref.original_forward
            return plain(*args, **kwargs)
        weight: Any = convolution.weight  # pyright: ignore[reportOptionalMemberAccess]
        if self._folded is None or not self._folded[0].holds([weight]):
            kernels = fold_weight(weight)
            if can_compute_packed(x):
                shape = torch.Size((*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1))
                kernels = [pack_kernel(kernel, _SETTINGS, shape) for kernel in kernels]
            self._folded = (Snapshot([weight]), kernels)
        return self.compute(x, self._folded[1], convolution.bias)  # pyright: ignore[reportOptionalMemberAccess]

    def may_compute(self, x: Tensor, convolution: nn.Conv2d) -> bool:
        """Whether folded kernels do all that is asked for: nothing that autograd records."""
        return not torch.is_grad_enabled()

    def compute(self, x: Tensor, kernels: list[Tensor], bias: Tensor | None) -> Tensor:
        """The folded result (see ``enlarge_and_convolve``)."""
        return enlarge_and_convolve(x, kernels, bias)

    def _fits(self, module: Any, convolution: Any, x: Tensor) -> bool:
        """A plain enlargement by two before a plain 3x3 convolution on the CPU, where folding was measured to
        be faster.
        """
        if type(convolution) is not nn.Conv2d or module.norm is not None or not module.interpolate:
            return False
        plain = (
            convolution.kernel_size,
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
        if plain != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or convolution.padding_mode != "zeros":
            return False
        weight = convolution.weight
        # Half precision would round the sums of weights; an offloaded weight is not here; a hook on the
        # convolution must run.
        exact = weight.device.type == "cpu" and weight.dtype == x.dtype in (torch.float32, torch.float64)
        if isinstance(weight, FakeTensor):  # a shape that stands for a GPU's weight (see ``bdm.plan``)
            return False
        hooked = (
            hasattr(convolution, "_hf_hook") or convolution._forward_hooks or convolution._forward_pre_hooks
        )
        work = 2 * weight.numel() * 4 * x.shape[0] * x.shape[-2] * x.shape[-1]
        return (
            exact
            and not hooked
            and not weight.is_inference()
            and work >= LEAST_FLOPS
            and self.may_compute(x, convolution)
        )


@contextmanager
def folded_upsampling(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, enlargements of a UNet or VAE run folded.

    The folded kernels are dropped at its end.

    A model inside another such block keeps that one's kernels.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Upsample2D):
                hang_hook(stack, module, FoldedUpsampling(), HOOK_NAME)
        yield


@contextmanager
def prepared_layers(*models: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, enlargements run folded, other layers packed (see ``bdm.speed.packing``)."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(folded_upsampling(model))
        stack.enter_context(packed_layers(*models))
        yield
