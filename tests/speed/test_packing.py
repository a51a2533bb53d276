"""Packed weights: the same numbers, and afterwards, or whenever something asks for them, the very weights
from before.
"""

import pytest
import torch
from torch import nn

from bdm.speed import packing
from bdm.speed.packing import packable, packed_layers, unpack_layers


@pytest.fixture
def layer():
    return nn.Conv2d(48, 32, 3, padding=1, stride=2)


LAYERS = {
    "strided": (nn.Conv2d(48, 32, 3, padding=1, stride=2), (2, 48, 8, 8), (1, 48, 5, 7)),
    "channels last": (
        nn.Conv2d(48, 32, 3).to(memory_format=torch.channels_last),
        (2, 48, 8, 8),
        (1, 48, 5, 7),
    ),
    "pixelwise": (nn.Conv2d(1000, 1024, 1), (2, 1000, 4, 4), (1, 1000, 1, 3)),
    "pixelwise, channels last": (
        nn.Conv2d(1024, 1000, 1).to(memory_format=torch.channels_last),
        (2, 1024, 4, 4),
        (1, 1024, 9, 3),
    ),
    "pixelwise, strided": (nn.Conv2d(320, 320, 1, stride=2, bias=False), (2, 320, 4, 4), (1, 320, 1, 3)),
    "groups, no bias": (nn.Conv2d(64, 64, 3, groups=2, bias=False), (2, 64, 4, 4), (1, 64, 3, 9)),
    "linear": (nn.Linear(1000, 1024), (2, 16, 1000), (40, 1000)),
    "linear, no bias": (nn.Linear(1024, 1000, bias=False), (1, 3, 16, 1024), (20, 1024)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_same_result_and_weights_restored_bit_for_bit(name):
    layer, *shapes = LAYERS[name]
    parameter, before, strides = layer.weight, layer.weight.detach().clone(), layer.weight.stride()
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        plain = [layer(x) for x in inputs]
        with packed_layers(layer):
            packed = [layer(x) for x in inputs]
            assert layer.weight.numel() == 0, "memory holds the weight once"
            unpack_layers(layer)
            assert torch.equal(layer.weight, before)
            packed += [layer(x) for x in inputs]
        for ours, theirs in zip(packed, plain * 2, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(layer(x), y) for x, y in zip(inputs, plain, strict=True))
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)
    assert layer.weight.stride() == strides


@pytest.mark.parametrize("bias", [True, False])
def test_few_weights_of_single_pixels_are_multiplied_as_they_are(bias, monkeypatch):
    layer, x = nn.Conv2d(24, 40, 1, bias=bias), torch.randn(2, 24, 5, 3)
    multiplied, linear = [], nn.functional.linear
    monkeypatch.setattr(packing.functional, "linear", lambda *given: multiplied.append(1) or linear(*given))
    with torch.no_grad():
        plain = layer(x)
        with packed_layers(layer):
            for values in (x, x.contiguous(memory_format=torch.channels_last)):
                torch.testing.assert_close(layer(values), plain, rtol=1e-5, atol=1e-5)
            assert layer.weight.shape == (40, 24, 1, 1)
    assert multiplied == [1, 1]


def test_an_error_inside_leaves_the_weights(layer):
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad(), packed_layers(layer):
        nn.Sequential(layer, nn.Conv2d(7, 1, 1))(torch.randn(1, 48, 4, 4))
    assert torch.equal(layer.weight, before)


def test_gradients_take_the_plain_way(layer):
    x = torch.randn(1, 48, 4, 4)
    with packed_layers(layer):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape


def test_few_rows_are_not_packed_for():
    layer = nn.Linear(1000, 1024)
    x = torch.randn(2, 1000)
    with torch.no_grad(), packed_layers(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer(torch.randn(20, 1000))
        assert layer.weight.numel() == 0
        layer(x)
        assert layer.weight.numel() == 0, "once packed, it stays so"


def test_reading_writing_and_moving_a_model_find_its_weights(layer):
    model, x = nn.Sequential(layer), torch.randn(1, 48, 4, 4)
    before = layer.weight.detach().clone()
    with torch.no_grad(), packed_layers(model):
        model(x)
        assert torch.equal(model.state_dict()["0.weight"], before)
        plain = model(x)
        model.load_state_dict({"0.weight": before * 2, "0.bias": layer.bias * 2})
        torch.testing.assert_close(model(x), plain * 2)
        model.double()
        torch.testing.assert_close(model(x.double()), plain.double() * 2, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.weight, before.double() * 2)
    assert torch.equal(layer.weight, before.double() * 2)
    model.load_state_dict({"0.weight": before, "0.bias": layer.bias})
    assert not model._state_dict_pre_hooks
    assert not model._load_state_dict_pre_hooks


def test_a_block_within_a_block_leaves_the_outer_ones_weights_packed(layer, monkeypatch):
    x, packed = torch.randn(1, 48, 4, 4), []
    pack = packing.pack_kernel
    monkeypatch.setattr(packing, "pack_kernel", lambda *given: packed.append(1) or pack(*given))
    with torch.no_grad(), packed_layers(layer):
        for _ in range(3):
            with packed_layers(layer):
                layer(x)
        assert packed == [1]
    assert layer.weight.numel() > 0


def test_what_gains_nothing_or_cannot_is_left_alone():
    others = [
        nn.Conv2d(4, 48, 3),
        nn.Linear(64, 64),
        nn.Conv2d(48, 48, 3, padding="same"),
        nn.Conv2d(48, 48, 3, device="meta"),
        nn.Conv2d(48, 48, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(48, 48, 3).double(),
        nn.ConvTranspose2d(48, 48, 3),
    ]
    assert packable(nn.ModuleList(others)) == []
    assert len(packable(nn.Sequential(nn.Conv2d(48, 48, 3)))) == 1
