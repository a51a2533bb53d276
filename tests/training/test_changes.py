"""What may change in a run on its way, and how it is named."""

import json

import pytest
import torch
from linear_run import LinearRecipe, Noise, config

from bdm.cli import parse
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.training.changes import meaning, refuse, settings_changes
from bdm.training.loop import train
from bdm.training.states import load_state

SHORT = dict(steps=3, warmup_steps=0)


class Seeing(LinearRecipe):
    """Notes which examples it is shown in training, by their place in the order."""

    def __init__(self, limit=2):
        super().__init__()
        self.source = EmojiSource(World(), limit=limit)
        self.seen = []

    def forward(self, batch):
        if self.training:
            self.seen.append(batch.indices)
        return super().forward(batch)


def few():
    recipe = Seeing()
    recipe.source = Noise(12)
    return recipe


def go(out, allow=(), recipe=None, **changes):
    recipe = recipe or Seeing()
    rare = dict(log_every=1, validate_every=100, grid_every=100, checkpoint_every=100)
    train(config(out, **rare | changes), recipe, "python train.py", allow)
    return recipe


def test_a_change_is_refused_unless_it_is_named(tmp_path):
    go(tmp_path, optimizer=SHORT)
    longer = dict(optimizer=SHORT | {"steps": 5, "weight_decay": 0.5})
    with pytest.raises(UserError, match=r"--allow optimizer\.steps,optimizer\.weight_decay"):
        go(tmp_path, **longer)
    with pytest.raises(UserError, match=r"\(optimizer.weight_decay: 0.01 -> 0.5\)"):
        go(tmp_path, ["optimizer.steps"], **longer)
    again = go(tmp_path, ["optimizer.steps", "optimizer.weight_decay"], **longer)
    assert len(again.seen) == 2
    history = [{"step": 3, "changes": ["optimizer.steps: 3 -> 5", "optimizer.weight_decay: 0.01 -> 0.5"]}]
    state = load_state(tmp_path / "states")
    assert state["history"] == history
    assert json.loads((tmp_path / "model/card.json").read_text())["history"] == history
    # What holds from now on, not what the state brought.
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5]
    go(tmp_path, ["optimizer.steps"], **longer)  # nothing is left to change


def test_a_group_of_settings_is_named_by_its_own_name(tmp_path):
    go(tmp_path, optimizer=SHORT)
    go(tmp_path, ["optimizer"], optimizer=SHORT | {"steps": 4, "betas": (0.5, 0.9)})
    assert load_state(tmp_path / "states")["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.9)


def test_names_that_name_nothing_and_what_never_may_change_are_refused(tmp_path):
    go(tmp_path, optimizer=SHORT)
    with pytest.raises(UserError, match=r"--allow optimizer.step: there is no such setting.*optimizer"):
        go(tmp_path, ["optimizer.step"], optimizer=SHORT)
    other = config(tmp_path, optimizer=SHORT | {"name": "prodigy"})
    changes = settings_changes(meaning(config(tmp_path, optimizer=SHORT)), other)
    with pytest.raises(UserError, match=r"optimizer.name cannot change within a run"):
        refuse(changes, other, ["optimizer"])
    larger = Seeing()
    larger.layer = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"or of another size"):
        go(tmp_path, ["optimizer"], larger, optimizer=SHORT | {"steps": 4})


def test_other_data_are_accepted_where_they_were_named(tmp_path):
    go(tmp_path, optimizer=SHORT)
    with pytest.raises(UserError, match=r"was run on other data.*--allow data\b"):
        go(tmp_path, ["optimizer.steps"], Seeing(3), optimizer=SHORT | {"steps": 4})
    for name in ("data", "data.language"):
        go(tmp_path / name, optimizer=SHORT)
        longer = SHORT | {"steps": 4}
        assert len(go(tmp_path / name, ["optimizer.steps", name], Seeing(3), optimizer=longer).seen) == 1


def test_another_batch_size_goes_on_where_the_samples_are(tmp_path):
    """No sample of a pass is drawn twice or left out, whatever the batches were."""
    first = go(tmp_path, recipe=few(), optimizer=SHORT | {"steps": 2, "batch_size": 4})
    more = go(tmp_path, ["optimizer"], few(), optimizer=SHORT | {"steps": 10, "batch_size": 2})
    drawn = [i for indices in (*first.seen, *more.seen) for i in indices]
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    state = load_state(tmp_path / "states")
    assert (state["step"], state["samples"], state["offset"]) == (10, 24, 0)
    # Where the place is none of the new batches', the rest of one is left out, and the next place is right.
    go(tmp_path, ["optimizer"], few(), optimizer=SHORT | {"steps": 11, "batch_size": 5})
    state = load_state(tmp_path / "states")
    assert (state["samples"], state["offset"]) == (29, 1)


def test_other_rate_factors_find_the_moments_by_their_names(tmp_path):
    go(tmp_path, optimizer=SHORT)
    before = load_state(tmp_path / "states")
    moments = dict(zip(before["names"], before["optimizer"]["state"].values(), strict=True))
    averages = dict(zip(before["names"], before["ema"]["average"], strict=True))
    # No step is taken: what was taken up is written again.
    regrouped = dict(optimizer=SHORT | {"rate_factors": {"layer.weight": 2.0}})
    from bdm.training.resuming import Progress, resume, save
    from bdm.training.setup import set_up

    run = config(tmp_path, log_every=1, validate_every=100, grid_every=100, checkpoint_every=100, **regrouped)
    state = set_up(run, Seeing())
    progress = resume(run, state, ["optimizer"])
    assert isinstance(progress, Progress)
    save(run, state, progress)
    after = load_state(tmp_path / "states")
    assert after["names"] != before["names"]
    for i, name in enumerate(after["names"]):
        assert torch.equal(after["ema"]["average"][i], averages[name])
        assert torch.equal(after["optimizer"]["state"][i]["exp_avg"], moments[name]["exp_avg"])
    assert [group["factor"] for group in after["optimizer"]["param_groups"]] == [1.0, 2.0]


def test_the_command_line_takes_names_and_settings_in_any_order():
    options = parse(["train", "a.yaml", "--allow", "optimizer.steps,data.urls", "optimizer.steps=5"])
    assert options.allow == ["optimizer.steps,data.urls"]
    assert options.overrides == ["optimizer.steps=5"]


class Filling(Seeing):
    """Fills caches, and notes what it was shown before."""

    filled_after = None

    def fill_caches(self, accelerator):
        self.filled_after = len(self.seen)


def test_a_run_is_refused_before_it_fills_its_caches(tmp_path):
    first = go(tmp_path / "one", recipe=Filling(), optimizer=SHORT)
    assert first.filled_after == 0, "before the first step"
    evaluation = dict(scorer=str(tmp_path / "none"), prompts=["a"])
    for out, changes, message in (
        ("one", dict(optimizer=SHORT | {"steps": 4}), r"--allow optimizer\.steps"),
        ("two", dict(init={"from": str(tmp_path / "none")}), "is no state and holds none"),
        ("two", dict(evaluation=evaluation), "draws nothing from texts"),
    ):
        recipe = Filling()
        with pytest.raises(UserError, match=message):
            go(tmp_path / out, recipe=recipe, **changes)
        assert recipe.filled_after is None
