"""A change beside a layer is the change in its weight."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from bdm.formats.change import Change
from bdm.plugins.low_rank import hang_low_rank, low_rank_changes

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6), (5, 3), (4, 7, 6)),
    "window": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (3, 6, 3, 3), (5, 3, 1, 1), (4, 6, 8, 8)),
    "point": (nn.Conv2d(6, 5, 1), (3, 6), (5, 3), (4, 6, 8, 8)),
}


def change(down, up, **more):
    factors = {"down": torch.randn(down), "up": torch.randn(up), "alpha": torch.tensor(2.0)}
    return Change(factors | more)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_each_sample_has_a_strength_of_its_own(name):
    layer, down, up, shape = LAYERS[name]
    given, x = change(down, up), torch.randn(shape)
    before, strengths = layer(x), torch.tensor([0.5, 0.0, -1.0, 2.0])
    weight = layer.weight.clone()
    with ExitStack() as stack:
        found = low_rank_changes(nn.ModuleDict({"layer": layer}), {"layer": given})
        assert found is not None
        hang_low_rank(stack, layer, found["layer"], lambda x: strengths)
        joined = layer(x)
    assert torch.equal(layer(x), before), "it leaves nothing behind"
    for i, strength in enumerate(strengths):
        layer.weight.copy_(weight + strength * given.weight(weight))
        torch.testing.assert_close(joined[i : i + 1], layer(x[i : i + 1]), rtol=3e-5, atol=1e-5)
        layer.weight.copy_(weight)


@pytest.mark.parametrize(
    "more", [{"bias": torch.randn(5)}, {"magnitude": torch.ones(5, 1)}, {"mid": torch.randn(3, 3, 3, 3)}]
)
def test_what_is_more_than_two_matrices_is_not_taken(more):
    layer, down, up, _ = LAYERS["linear"]
    assert low_rank_changes(nn.ModuleDict({"layer": layer}), {"layer": change(down, up, **more)}) is None


def test_half_precision_and_other_layers_are_not_taken():
    layers = {"layer": nn.Linear(6, 5).to(torch.bfloat16), "grouped": nn.Conv2d(6, 6, 1, groups=2)}
    network = nn.ModuleDict(layers)
    assert low_rank_changes(network, {"layer": change((3, 6), (5, 3))}) is None
    assert low_rank_changes(network, {"grouped": change((3, 3), (6, 3))}) is None
    assert low_rank_changes(network, {"missing": change((3, 6), (5, 3))}) is None
