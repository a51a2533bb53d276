"""Packed convolution weights: the same numbers, and afterwards the very weights from before."""

import pytest
import torch
from torch import nn

from bdm.packing import packable, packed_convolutions, unpack_convolutions


@pytest.fixture
def layer():
    return nn.Conv2d(48, 32, 3, padding=1, stride=2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_same_result_and_weights_restored_bit_for_bit(layer, layout):
    layer.to(memory_format=layout)
    parameter, before, strides = layer.weight, layer.weight.detach().clone(), layer.weight.stride()
    inputs = [torch.randn(shape) for shape in ((2, 48, 8, 8), (1, 48, 5, 7))]
    with torch.no_grad():
        plain = [layer(x) for x in inputs]
        with packed_convolutions(layer):
            packed = [layer(x) for x in inputs]
            assert layer.weight.numel() == 0, "memory holds the weight once"
            unpack_convolutions(layer)
            assert torch.equal(layer.weight, before)
            packed += [layer(x) for x in inputs]
        for ours, theirs in zip(packed, plain * 2, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(layer(x), y) for x, y in zip(inputs, plain, strict=True))
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)
    assert layer.weight.stride() == strides


def test_an_error_inside_leaves_the_weights(layer):
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad(), packed_convolutions(layer):
        nn.Sequential(layer, nn.Conv2d(7, 1, 1))(torch.randn(1, 48, 4, 4))
    assert torch.equal(layer.weight, before)


def test_gradients_take_the_plain_way(layer):
    x = torch.randn(1, 48, 4, 4)
    with packed_convolutions(layer):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape


def test_what_gains_nothing_or_cannot_is_left_alone():
    others = [
        nn.Conv2d(4, 48, 3), nn.Conv2d(48, 48, 1), nn.Conv2d(48, 48, 3, padding="same"), nn.Conv2d(48, 48, 3, device="meta"),
        nn.Conv2d(48, 48, 3, padding=1, padding_mode="reflect"), nn.Conv2d(48, 48, 3).double(), nn.ConvTranspose2d(48, 48, 3),
    ]  # fmt: skip
    assert packable(nn.ModuleList(others)) == []
    assert len(packable(nn.Sequential(nn.Conv2d(48, 48, 3)))) == 1
