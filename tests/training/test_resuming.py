"""A run that goes on is the one that was not interrupted."""

import json
import os
import random
import signal
import time
import traceback

import pytest
import torch
from linear_run import DroppingRecipe, Stop, StoppingRecipe, run

from bdm.errors import UserError
from bdm.training import states
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
