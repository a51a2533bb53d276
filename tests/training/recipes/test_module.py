"""Recipes and data of other packages."""

import sys

import pytest
import torch

from bdm.config import RunConfig
from bdm.errors import UserError
from bdm.training.loop import train
from bdm.training.recipes.build import build_recipe

MODULE = """
import torch
from bdm.data.source import Example
from bdm.training.recipes.base import Recipe

class Noise:
    def __init__(self, count=4):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return Example("", pixels=torch.full((3, 8, 8), index, dtype=torch.uint8))
    def caption(self, index):
        return ""
    @property
    def validation(self):
        return self

class Scale(Recipe):
    def __init__(self, source, start, seed=0):
        super().__init__(source, seed)
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, start)
    def parts(self):
        return {"layer": self.layer}
    def forward(self, batch):
        return {"loss": self.layer(batch.pixels.float().mean((1, 2, 3))[:, None]).square().mean()}
    def save(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.layer.state_dict(), folder / "layer.pt")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_recipes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_recipes"
    sys.modules.pop("their_recipes", None)


def config(out, recipe, data, **arguments):
    optimizer = dict(steps=3, batch_size=2, learning_rate=0.1, warmup_steps=0)
    recipe, data = (dict(kind="module", **one) for one in (recipe, data))
    return RunConfig(
        out=out, recipe=recipe, data=data, optimizer=optimizer, trackers=(), log_every=1, validate_every=9,
        grid_every=9, checkpoint_every=9,
    )  # fmt: skip


def test_the_loop_trains_them(module, tmp_path):
    recipe = dict(target=f"{module}:Scale", arguments={"start": 2.0})
    run = config(tmp_path / "out", recipe, dict(target=f"{module}:Noise", arguments={"count": 6}))
    built = build_recipe(run)
    assert len(built.source) == 6
    saved = torch.load(train(run, built) / "layer.pt", weights_only=True)
    assert abs(saved["weight"].item()) < 2


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ({"target": "no_such:Scale"}, {}, "Python finds no module 'no_such'"),
        ({"target": "their_recipes:Scales"}, {}, "has no Scales"),
        ({"target": "their_recipes.Scale"}, {}, "give package.module:Class"),
        ({"target": "their_recipes:number"}, {}, "is a int; give a class"),
        ({"target": "their_recipes:Noise", "arguments": {}}, {}, "cannot take the arguments seed"),
        ({"target": "their_recipes:Scale"}, {}, "missing a required argument: 'start'"),
        ({}, {"target": "their_recipes:Scale"}, "data.target"),
        ({}, {"target": "their_recipes:Noise", "arguments": {"size": 3}}, "cannot take the arguments size"),
        ({}, {"target": "builtins:list"}, "without caption, validation"),
    ],
)
def test_what_is_none_is_refused_in_one_line(module, tmp_path, recipe, data, message):
    plain = {"target": f"{module}:Scale", "arguments": {"start": 1.0}}
    run = config(tmp_path / "out", recipe or plain, data or {"target": f"{module}:Noise"})
    with pytest.raises(UserError, match=message) as error:
        build_recipe(run)
    assert "\n" not in str(error.value)
    assert not run.out.exists()
