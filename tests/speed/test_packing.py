"""Packed weights: the same numbers, and afterwards, or whenever something asks for them, the very weights
from before.
"""

import copy
import io
import pickle
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from bdm.speed import packing
from bdm.speed.packing import pack_layers, packable
from bdm.speed.watched import WatchedParameter, watch


@contextmanager
def packed_layers(model):
    with ExitStack() as stack:
        yield pack_layers(stack, model)


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
        with packed_layers(layer) as (packed,):
            ours = [layer(x) for x in inputs]
            assert packed.is_packed
            assert type(layer.weight) is WatchedParameter
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(layer(x), y) for x, y in zip(inputs, plain, strict=True))
    assert layer.weight is parameter
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight, before)
    assert layer.weight.stride() == strides


def stored_bytes(parameter):
    """What a parameter's own storage takes, without asking it for its values."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.untyped_storage().nbytes()


READERS = {
    "state_dict": lambda layer: layer.state_dict()["weight"].clone(),
    "state_dict of what it lies in": lambda layer: nn.Sequential(layer).state_dict()["0.weight"].clone(),
    "data": lambda layer: layer.weight.data.clone(),
    "detach": lambda layer: layer.weight.detach().clone(),
    "an operation": lambda layer: layer.weight * 1,
    "a list of weights": lambda layer: torch._foreach_mul([layer.weight], 1.0)[0],
    "an operator": lambda layer: torch.ops.aten.clone(layer.weight),
    "deepcopy": lambda layer: copy.deepcopy(layer).weight.detach(),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).weight.detach(),
    "torch.save": lambda layer: _saved_and_loaded(layer.state_dict())["weight"],
    "numpy": lambda layer: torch.from_numpy(layer.weight.detach().numpy().copy()),
    "an index": lambda layer: torch.stack(list(layer.weight)),
    "a copy into another": lambda layer: torch.empty(layer.weight.shape).copy_(layer.weight),
    "double": lambda layer: layer.double().weight.float().detach(),
}


def _saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_weight_finds_it_whole(layer, reader):
    x, before = torch.randn(1, 48, 4, 4), layer.weight.detach().clone()
    with torch.no_grad(), packed_layers(layer) as (packed,):
        plain = layer(x)
        assert packed.is_packed
        assert stored_bytes(layer.weight) < 100, "memory holds the weight once"
        assert torch.equal(READERS[reader](layer), before)
        again = layer(x.to(layer.weight.dtype)).float()
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
        assert not packed.is_packed, "an alias may be written to later"


WRITERS = {
    "mul_": lambda layer: layer.weight.mul_(2),
    "data.mul_": lambda layer: layer.weight.data.mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 2)),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {"weight": layer.weight.detach() * 2, "bias": layer.bias}
    ),
    "assigned": lambda layer: layer.load_state_dict(
        {"weight": layer.weight.detach() * 2, "bias": layer.bias.detach()}, assign=True
    ),
    "a list of weights": lambda layer: torch._foreach_mul_([layer.weight], 2),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(doubled_of(layer))),
}


def doubled_of(layer):
    return copy.deepcopy(layer).weight.detach() * 2


@pytest.mark.parametrize("writer", WRITERS)
def test_a_weight_that_is_written_to_counts(layer, writer):
    x, wanted = torch.randn(1, 48, 4, 4), layer.weight.detach() * 2
    with torch.no_grad(), packed_layers(layer):
        layer(x)
        WRITERS[writer](layer)
        expected = nn.functional.conv2d(x, wanted, layer.bias, stride=2, padding=1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, wanted), "nor is it overwritten at the end"


def test_an_alias_of_a_weight_that_was_read_stays_one(layer):
    x = torch.randn(1, 48, 4, 4)
    with torch.no_grad(), packed_layers(layer):
        layer(x)
        alias = layer.state_dict()["weight"]
        layer(x)
        alias.mul_(2)
        expected = nn.functional.conv2d(x, alias, layer.bias, stride=2, padding=1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_what_needs_no_values_leaves_a_weight_packed(layer):
    before = (layer.weight.shape, layer.weight.dtype, layer.weight.numel())
    with torch.no_grad(), packed_layers(layer) as (packed,):
        layer(torch.randn(1, 48, 4, 4))
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.numel()) == before
        assert weight.device.type == "cpu"
        layer.requires_grad_(False)
        assert isinstance(weight, nn.Parameter)
        assert len(list(layer.parameters())) == 2
        assert packed.is_packed


def test_who_comes_by_the_watch_finds_no_number(layer):
    with torch.no_grad(), packed_layers(layer):
        layer(torch.randn(1, 48, 4, 4))
        with torch._C.DisableTorchFunctionSubclass():
            assert layer.weight.isnan().all()


def test_copies_and_pickles_are_plain_modules(layer):
    x = torch.randn(1, 48, 4, 4)
    with torch.no_grad(), packed_layers(layer):
        plain = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is nn.Conv2d
            torch.testing.assert_close(other(x), plain)


def test_a_weight_shared_by_two_layers(layer):
    other, x = nn.Conv2d(48, 32, 3, padding=1, stride=2), torch.randn(1, 48, 4, 4)
    other.weight, other.bias = layer.weight, layer.bias
    with torch.no_grad():
        plain = layer(x)
        with packed_layers(nn.ModuleList([layer, other])):
            for _ in range(2):
                torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(other(x), plain, rtol=1e-5, atol=1e-5)


def test_a_wrapper_that_comes_later_and_goes_later(layer):
    """As accelerate's offload hooks wrap ``forward``, in any order with ours."""
    x, seen = torch.randn(1, 48, 4, 4), []
    with torch.no_grad():
        plain = layer(x)
        with packed_layers(layer):
            inner = layer.forward
            layer.forward = lambda *args: seen.append(1) or inner(*args)
            torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), plain)
        del layer.forward
        assert torch.equal(layer(x), plain)
    assert seen == [1, 1]


def test_under_inference_mode_weights_can_still_be_trained(layer):
    with torch.inference_mode(), packed_layers(layer):
        layer(torch.randn(1, 48, 4, 4))
    assert not layer.weight.is_inference()
    layer.requires_grad_(True)(torch.randn(1, 48, 4, 4)).sum().backward()
    assert layer.weight.grad is not None


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
    assert multiplied == [1, 1]


def test_an_error_inside_leaves_the_weights(layer):
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad(), packed_layers(layer):
        nn.Sequential(layer, nn.Conv2d(7, 1, 1))(torch.randn(1, 48, 4, 4))
    assert torch.equal(layer.weight, before)
    assert type(layer) is nn.Conv2d


def test_gradients_and_autocast_take_the_plain_way(layer):
    x = torch.randn(1, 48, 4, 4)
    with packed_layers(layer):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape


def test_few_rows_are_not_packed_for():
    layer = nn.Linear(1000, 1024)
    x = torch.randn(2, 1000)
    with torch.no_grad(), packed_layers(layer) as (packed,):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer(torch.randn(20, 1000))
        assert packed.is_packed
        layer(x)
        assert packed.is_packed, "once packed, it stays so"


def test_where_the_kernels_are_missing_nothing_is_packed(layer, monkeypatch):
    monkeypatch.setattr(packing.kernels, "packed_kernels_work", lambda: False)
    with packed_layers(layer) as packed:
        assert packed == []
        assert type(layer) is nn.Conv2d


def test_what_gains_nothing_or_cannot_is_left_alone():
    hooked, wrapped, watched = (nn.Conv2d(48, 48, 3) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    wrapped.forward = lambda x: x
    watch(watched.weight, lambda: None)
    others = [
        nn.Conv2d(4, 48, 3),
        nn.Linear(64, 64),
        nn.Conv2d(48, 48, 3, padding="same"),
        nn.Conv2d(48, 48, 3, device="meta"),
        nn.Conv2d(48, 48, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(48, 48, 3).double(),
        nn.ConvTranspose2d(48, 48, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(48, 48, 3)),
        hooked,
        wrapped,
        watched,
    ]
    with torch.inference_mode():
        others.append(nn.Conv2d(48, 48, 3))
    assert packable(nn.ModuleList(others)) == []
    assert len(packable(nn.Sequential(nn.Conv2d(48, 48, 3)))) == 1
