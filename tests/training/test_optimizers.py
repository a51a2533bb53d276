from pathlib import Path

import pytest
import torch
from linear_run import config
from optimizer_names import NAMES
from torch import nn

from bdm import extras
from bdm.errors import UserError
from bdm.training.optimizers import learning_rate, make_optimizer


def descend(optimizer, weight, steps):
    """Least squares: enough values for moments in 8 bits, enough steps for Prodigy to find its step size."""
    target = torch.linspace(-1, 1, weight.numel()).view_as(weight)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_and_goes_on_from_its_state(name):
    weights, ends = [nn.Parameter(torch.zeros(128, 64)) for _ in range(2)], []
    rate = 1.0 if name == "prodigy" else 0.02
    whole, cut = (make_optimizer(name, [w], rate, weight_decay=0.0) for w in weights)
    start = descend(whole, weights[0], 1)
    ends.append(descend(whole, weights[0], 119))
    descend(cut, weights[1], 60)
    again = make_optimizer(name, [weights[1]], rate, weight_decay=0.0)
    again.load_state_dict(cut.state_dict())
    ends.append(descend(again, weights[1], 60))
    assert ends[0] < 0.5 * start
    assert torch.equal(*weights)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            make_optimizer(name, [nn.Parameter(torch.zeros(2))], 0.1)
    assert make_optimizer("adamw", [nn.Parameter(torch.zeros(2))], 0.1).defaults["fused"]


def test_learning_rate():
    optimizer = config(Path("x")).optimizer
    rates = [learning_rate(i, optimizer) for i in range(12)]
    assert rates[:3] == pytest.approx([0.025, 0.05, 0.05])
    assert rates[7] == pytest.approx(0.025)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
