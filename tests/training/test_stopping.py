"""What ends a run or a step of it early."""

import json
import math
import os
import signal
import time

import pytest
import torch
from linear_run import DroppingRecipe, LinearRecipe, run

from bdm.errors import UserError
from bdm.training import states
from bdm.training.loop import Stopped
from bdm.training.metrics import read_metrics


class NanRecipe(LinearRecipe):
    """Its loss is NaN for the batches of some calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.bad = 0, calls

    def forward(self, batch):
        terms = super().forward(batch)
        self.calls += self.training
        return {"loss": terms["loss"] * float("nan")} if self.training and self.calls in self.bad else terms


def test_steps_that_are_not_finite_are_left_out_and_named(tmp_path):
    weights = run(tmp_path / "a", NanRecipe({3, 7}), skip_limit=2)
    assert all(torch.isfinite(t).all() for t in weights.values())
    rows = [json.loads(line) for line in (tmp_path / "a/skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 7]
    assert all(len(row["examples"]) == 4 for row in rows)
    with pytest.raises(UserError, match="skip_limit"):
        run(tmp_path / "b", NanRecipe({3, 7, 8}), skip_limit=2)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_state_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, name):
    class Signalled(DroppingRecipe):
        def forward(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 7:
                os.kill(os.getpid(), getattr(signal, name))
            return super().forward(batch)

    before = signal.getsignal(getattr(signal, name))
    whole = run(tmp_path / "whole", DroppingRecipe(), validate_every=100)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "cut", Signalled(), validate_every=100)
    assert (stopped.value.step, stopped.value.number) == (7, getattr(signal, name))
    assert signal.getsignal(getattr(signal, name)) is before
    again = run(tmp_path / "cut", DroppingRecipe(), validate_every=100)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_signal_to_the_whole_process_group_leaves_the_data_workers(tmp_path):
    """Schedulers and launchers signal groups.

    A data worker that died would take the run with it before its state is saved.
    """

    class Grouped(DroppingRecipe):
        def forward(self, batch):
            self.calls = getattr(self, "calls", 0) + self.training
            if self.training and self.calls == 7:
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)
            return super().forward(batch)

    child = os.fork()
    if child == 0:
        os.setpgrp()
        try:
            run(tmp_path / "cut", Grouped(), workers=2)
        except Stopped as stopped:
            os._exit(stopped.step)
        finally:
            os._exit(100)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    again, whole = run(tmp_path / "cut", DroppingRecipe()), run(tmp_path / "whole", DroppingRecipe())
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("stop", [4, 12])
@pytest.mark.parametrize("old", [False, True])
def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path, stop, old):
    """Also from a state of before, which calls it "looked"."""

    class Signalled(LinearRecipe):
        def forward(self, batch):
            self.calls = getattr(self, "calls", 0) + self.training
            if self.training and self.calls == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch)

    with pytest.raises(Stopped):
        run(tmp_path, Signalled(), log_every=100)
    if old:
        (path,) = states.state_files(tmp_path / "states")[:1]
        state = torch.load(path, weights_only=True)
        state["looked"] = state.pop("evaluated")
        torch.save(state, path)
    run(tmp_path, log_every=100)
    evaluated = [row["step"] for row in read_metrics(tmp_path) if "validation/loss" in row]
    assert evaluated == [4, 8, 12]
    assert json.loads((tmp_path / "model/card.json").read_text())["validation"]


def test_skipped_steps_name_keys_where_a_source_has_them(tmp_path):
    recipe = NanRecipe({2})
    recipe.source.key = lambda index: f"shard.tar:{index}"
    run(tmp_path, recipe)
    (row,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert all(key.startswith("shard.tar:") for key in row["examples"])
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path) if "loss" in row)
