"""A run that goes on is the one that was not interrupted."""

import json
import os
import random
import signal
import time
import traceback

import pytest
import torch
from linear_run import DroppingRecipe, LinearRecipe, Stop, StoppingRecipe, config, run

from bdm.config.data import FolderConfig
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.training import states
from bdm.training.loop import train
from bdm.training.metrics import read_metrics


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe())
    assert not (tmp_path / "cut/model").exists()
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    for out in ("whole", "cut"):
        assert [row["step"] for row in read_metrics(tmp_path / out) if "loss" in row] == [2, 4, 6, 8, 10, 12]


def test_changed_configuration_is_refused_with_the_difference(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.05 -> 0.01"):
        run(tmp_path, optimizer=dict(learning_rate=0.01))
    run(tmp_path, log_every=5, keep_last=1)  # these do not change the result


def kill_until_done(out, kills, seed, **changes):
    """Run in child processes that are killed at random moments; returns how many kills met a living one."""
    dice, met = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                run(out, DroppingRecipe(), **changes)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if met < kills:
            time.sleep(dice.uniform(0.02, 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        met += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run ended with an error of its own"
        if (out / "model").exists():
            return met


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_runs_end_bit_identical(tmp_path, kills):
    """SIGKILL at random moments, also while a state is written.

    The end is that of the run that was left alone.
    """
    changes = dict(
        checkpoint_every=5,
        optimizer=dict(steps=150 * kills),
        log_every=10,
        validate_every=10**6,
        grid_every=10**6,
    )
    whole = run(tmp_path / "whole", DroppingRecipe(), **changes)
    met = kill_until_done(tmp_path / "killed", kills, 1, **changes)
    assert met >= kills - 1
    again = torch.load(tmp_path / "killed/model/layer.pt", weights_only=True)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_refused_run_leaves_its_folder(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="another configuration"):
        run(tmp_path, optimizer=dict(learning_rate=0.01), trackers=("tensorboard",))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0)])
def test_a_resume_may_change_the_number_of_data_workers(tmp_path, first, then):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), workers=first)
    again = run(tmp_path / "cut", workers=then)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_state_from_before_a_setting_existed_goes_on(tmp_path):
    run(tmp_path, optimizer=dict(steps=12))
    path = states.state_files(tmp_path / "states")[0]
    state = torch.load(path, weights_only=True)
    old = json.loads(state["run"])
    del old["optimizer"]["name"]
    torch.save(state | {"run": json.dumps(old)}, path)
    run(tmp_path, optimizer=dict(steps=12))


CONSTANT = dict(schedule="constant", warmup_steps=2)


def test_a_run_at_a_constant_rate_goes_on_longer_than_it_was_meant_to(tmp_path):
    """Each step of it is what it is in the longer run."""
    whole = run(tmp_path / "whole", optimizer=CONSTANT)
    run(tmp_path / "more", optimizer=CONSTANT | {"steps": 7})
    again = run(tmp_path / "more", optimizer=CONSTANT)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    (change,) = map(json.loads, (tmp_path / "more/changes.jsonl").read_text().splitlines())
    assert change == {"step": 7, "changes": ["optimizer.steps: 7 -> 12"]}
    assert not (tmp_path / "whole/changes.jsonl").exists()


def test_a_run_at_a_constant_rate_goes_on_with_another(tmp_path):
    run(tmp_path / "one", optimizer=CONSTANT | {"steps": 7})
    run(tmp_path / "one", optimizer=CONSTANT | {"learning_rate": 0.01})
    rows = {row["step"]: row["lr"] for row in read_metrics(tmp_path / "one") if "lr" in row}
    assert (rows[6], rows[8]) == (0.05, 0.01)
    with pytest.raises(UserError, match="optimizer.weight_decay"):
        run(tmp_path / "one", optimizer=CONSTANT | {"steps": 20, "weight_decay": 0.5})


def test_a_run_whose_rate_depends_on_its_length_does_not(tmp_path):
    run(tmp_path, optimizer=dict(steps=8))
    with pytest.raises(UserError, match=r"optimizer.steps: 8 -> 12"):
        run(tmp_path)


def test_fewer_steps_than_are_done_publish_what_there_is(tmp_path):
    whole = run(tmp_path, optimizer=CONSTANT)
    again = run(tmp_path, optimizer=CONSTANT | {"steps": 5})
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert json.loads((tmp_path / "model/card.json").read_text())["steps"] == 12


def folder_config(out, path):
    """A run whose data lie in a folder; the recipe brings its own."""
    return config(out).model_copy(update={"data": FolderConfig(kind="folder", path=path)})


def test_data_may_move_but_not_change(tmp_path):
    recipe = LinearRecipe()
    train(folder_config(tmp_path / "out", tmp_path / "a"), recipe)
    train(folder_config(tmp_path / "out", tmp_path / "b"), LinearRecipe())
    other = LinearRecipe()
    other.source = EmojiSource(World(), limit=3)
    with pytest.raises(UserError, match=r"was run on other data \(\d+ examples.*would repeat some"):
        train(folder_config(tmp_path / "out", tmp_path / "b"), other)
    sharded = LinearRecipe()
    sharded.source.shard_sizes = [2, len(sharded.source) - 2]
    with pytest.raises(UserError, match="in 2 shards"):
        train(folder_config(tmp_path / "out", tmp_path / "b"), sharded)
