import threading

import pytest
import torch
from linear_run import Stop, StoppingRecipe, run
from torch import nn

from bdm.parallel.whole import whole
from bdm.training.averaging import Aside, AveragedWeights
from bdm.training.states import load_state


@pytest.mark.parametrize("on_cpu", [False, True])
def test_average_is_the_recursion_and_applying_it_is_undone(on_cpu):
    layer = nn.Linear(2, 2)
    ema = AveragedWeights(list(layer.parameters()), 0.5, on_cpu)
    expected = layer.weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            layer.weight += torch.randn(2, 2)
        ema.step()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    own = layer.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight.detach(), own)
    again = AveragedWeights(list(layer.parameters()), 0.5, on_cpu)
    again.load_state_dict(ema.collected(whole(keep=True)))
    assert again.steps == 29
    assert torch.equal(again.average[0], ema.average[0])


def test_an_average_on_the_cpu_is_that_beside_the_weights_bit_for_bit():
    torch.manual_seed(0)
    layer = nn.Linear(64, 33)
    beside, aside = (AveragedWeights(list(layer.parameters()), 0.99, on_cpu) for on_cpu in (False, True))
    for _ in range(40):
        with torch.no_grad():
            layer.weight += 0.01 * torch.randn(33, 64)
        beside.step()
        aside.step()
    for one, other in zip(beside.average, aside.average, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, layer.weight) or one is beside.average[1]


def test_training_goes_on_while_the_cpu_averages():
    """What is averaged is the weights of the step, whatever they are meanwhile."""
    weight = nn.Parameter(torch.ones(3))
    aside, go, seen = Aside([weight]), threading.Event(), []

    def use(weights):
        assert go.wait(20)
        seen.append(weights[0].tolist())

    aside.copy_and(use)
    with torch.no_grad():
        weight += 1
    assert not seen
    go.set()
    aside.copy_and(use)
    aside.wait()
    assert seen == [[1.0] * 3, [2.0] * 3]


def test_a_run_with_the_average_on_the_cpu_is_the_same_and_goes_on_either_way(tmp_path, monkeypatch):
    used = []
    plain = Aside.copy_and
    monkeypatch.setattr(Aside, "copy_and", lambda self, use: (used.append(1), plain(self, use)))
    whole = run(tmp_path / "whole")
    assert not used
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), optimizer={"ema_device": "cpu"})
    assert len(used) >= 8
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    run(tmp_path / "cpu", optimizer={"ema_device": "cpu"})
    one, other = (load_state(tmp_path / name / "states") for name in ("whole", "cpu"))
    assert all(map(torch.equal, one["ema"]["average"], other["ema"]["average"]))
