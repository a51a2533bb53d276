"""Folded enlargements: the same numbers from 16 of 36 products, and never from old weights."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from bdm.bench.compare import count_flops
from bdm.speed import folding
from bdm.speed.folding import enlarge_and_convolve, fold_layers, fold_weight


@contextmanager
def folded_upsampling(model, pack=True):
    with ExitStack() as stack:
        fold_layers(stack, model, pack)
        yield


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(folding, "LEAST_FLOPS", 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 1, 1)])
def test_identity(dtype, tolerance, shape):
    layer = Upsample2D(6, use_conv=True, out_channels=4).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        plain, plain_flops = layer(x), count_flops(lambda: layer(x))
        folded = enlarge_and_convolve(x, fold_weight(layer.conv.weight), layer.conv.bias)
        assert (folded - plain).abs().max() <= tolerance * plain.abs().max()
        with folded_upsampling(layer):
            hooked = layer(x)  # folds the weight, and packs it where that is possible
            again, flops = layer(x), count_flops(lambda: layer(x))
        assert (hooked - folded).abs().max() <= tolerance * plain.abs().max()
        assert torch.equal(again, hooked)
        if shape[-1] > 1:
            assert 0.4 < flops / plain_flops < 0.65, "4/9, and a little for the rows beyond the border"
        assert torch.equal(layer(x), plain), "nothing stays behind"


@torch.no_grad()
def test_changed_weights_count():
    layer, x = Upsample2D(3, use_conv=True), torch.randn(1, 3, 4, 4)

    def check():
        folded, wanted = (
            layer(x),
            torch.nn.functional.conv2d(
                x.repeat_interleave(2, 2).repeat_interleave(2, 3), *weights(), padding=1
            ),
        )
        torch.testing.assert_close(folded, wanted, rtol=1e-5, atol=1e-5)

    def weights():
        return layer.conv.weight, layer.conv.bias

    with folded_upsampling(layer):
        check()
        layer.conv.weight.mul_(2)
        check()
        kept = layer.conv.weight.data
        layer.conv.weight.data = kept + 1
        check()
        layer.conv.weight.data = kept
        check()


@torch.no_grad()
def test_memory_that_is_used_again_is_not_taken_for_the_old_weight():
    """Freed memory is what the allocator gives out next, often at the very address."""
    layer, x = Upsample2D(16, use_conv=True), torch.randn(1, 16, 4, 4)
    with folded_upsampling(layer):
        for swaps in (1, 2, 3) * 7:
            for _ in range(swaps):
                layer.conv.weight.data = torch.empty(0)
                layer.conv.weight.data = torch.randn(16, 16, 3, 3)
            plain = torch.nn.functional.conv2d(
                x.repeat_interleave(2, 2).repeat_interleave(2, 3),
                layer.conv.weight,
                layer.conv.bias,
                padding=1,
            )
            torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-3)


def test_where_it_is_not_exact_the_layer_runs_as_it_is():
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        for layer, given, size in (
            (Upsample2D(4, use_conv=True), x, (7, 9)),
            (Upsample2D(4, use_conv=True).bfloat16(), x.bfloat16(), None),
            (Upsample2D(4, use_conv_transpose=True), x, None),
            (Upsample2D(4), x, None),
            (Upsample2D(4, use_conv=True, kernel_size=1, padding=0), x, None),
        ):
            plain = layer(given, size)
            with folded_upsampling(layer):
                assert torch.equal(layer(given, size), plain)
    layer = Upsample2D(4, use_conv=True)
    with folded_upsampling(layer):
        layer(x).sum().backward()
        assert layer.conv.weight.grad is not None
        seen = []
        layer.conv.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            layer(x)
        assert seen == [1], "somebody else's hook on the convolution runs"
