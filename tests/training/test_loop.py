"""The loop knows nothing of what it trains."""

import json

import pytest
import torch
from linear_run import LinearRecipe, Stop, StoppingRecipe, run

from bdm.errors import UserError
from bdm.training import setup
from bdm.training.metrics import read_metrics


def test_rate_factors_scale_the_steps_of_the_parameters_they_name(tmp_path):
    factors = {"layer.b*": 10.0}
    # Adam's first step is the learning rate itself, whatever the gradient.
    one = dict(steps=1, warmup_steps=0, weight_decay=0.0, ema_decay=0.0, rate_factors=factors)
    before, after = LinearRecipe().layer, run(tmp_path / "one", optimizer=one)
    torch.testing.assert_close((after["weight"] - before.weight).abs(), torch.full((1, 3), 0.05))
    torch.testing.assert_close((after["bias"] - before.bias).abs(), torch.full((1,), 0.5))
    whole = run(tmp_path / "whole", optimizer={"rate_factors": factors})
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), optimizer={"rate_factors": factors})
    again = run(tmp_path / "cut", optimizer={"rate_factors": factors})
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    with pytest.raises(UserError, match=r"'layer\.zero'; names are such as layer\.weight"):
        run(tmp_path / "none", optimizer={"rate_factors": {"layer.zero": 2.0}})


def test_accumulation_gives_the_same_weights(tmp_path):
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", optimizer=dict(accumulation=2))
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], atol=1e-6, rtol=1e-5)


def test_only_the_parts_train_and_the_run_folder_is_complete(tmp_path):
    recipe = LinearRecipe()
    before = {k: v.clone() for k, v in recipe.state_dict().items()}
    run(tmp_path, recipe)
    after = recipe.state_dict()
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["layer.weight"], after["layer.weight"])
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.jsonl", "loss.png", "states", "model"}
    card = json.loads((tmp_path / "model/card.json").read_text())
    assert card["steps"] == 12
    assert card["command"] == "python train.py"
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_do_not_change_the_result(tmp_path, workers):
    whole = run(tmp_path / "none")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.values(), run(tmp_path / "some", workers=workers).values(), strict=True)
    )


class SteepRecipe(LinearRecipe):
    """Its gradient has norm 100 in the direction of one weight."""

    def forward(self, batch):
        return {"loss": 100 * self.layer.weight[0, 0]}


@pytest.mark.parametrize(("most", "moved"), [(1.0, 0.05), (20.0, 1.0), (1e6, 5.0)])
def test_gradients_are_scaled_down_to_the_largest_norm(tmp_path, monkeypatch, most, moved):
    """A plain step of gradient descent is the rate times the gradient's norm, as far as that is allowed."""
    monkeypatch.setattr(setup, "make_optimizer", lambda name, groups, rate, *_: torch.optim.SGD(groups, rate))
    before = LinearRecipe().layer.weight.detach()
    optimizer = dict(steps=1, warmup_steps=0, ema_decay=0.0, max_grad_norm=most)
    after = run(tmp_path, SteepRecipe(), log_every=1, optimizer=optimizer)["weight"]
    torch.testing.assert_close(before - after, torch.tensor([[moved, 0.0, 0.0]]))
    (row,) = [row for row in read_metrics(tmp_path) if "grad_norm" in row]
    assert row["grad_norm"] == pytest.approx(100)


def test_every_step_draws_its_own_dropout(tmp_path):
    class Dropping(LinearRecipe):
        def forward(self, batch):
            if self.training:
                masks.append(torch.dropout(torch.ones(64), 0.5, train=True))
            return super().forward(batch)

    masks = []
    run(tmp_path / "a", Dropping())
    run(tmp_path / "b", Dropping())
    first, second = masks[:12], masks[12:]
    assert len({tuple(mask.tolist()) for mask in first}) == 12
    assert all(map(torch.equal, first, second)), "a step's own is the same in every run"
