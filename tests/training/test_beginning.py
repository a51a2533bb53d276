"""A run that begins at the end of another one."""

import json
import shutil

import pytest
import torch
import yaml
from linear_run import LinearRecipe, Stop, StoppingRecipe, config, run

from bdm.config import RunConfig
from bdm.errors import UserError
from bdm.training.beginning import begin
from bdm.training.loop import train
from bdm.training.setup import set_up
from bdm.training.states import load_state, state_files

RARE = dict(log_every=1, validate_every=100, grid_every=100, checkpoint_every=2)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A finished run of five steps of 4 samples, and its state."""
    out = tmp_path_factory.mktemp("stages") / "one"
    run(out, optimizer=dict(steps=5, warmup_steps=0), **RARE)
    return out, load_state(out / "states")


def begun(out, init, recipe=None, **changes):
    """A fresh run's state as it begins, and its progress."""
    options = RARE | {"init": init} | changes
    started = config(out, **options)
    state = set_up(started, recipe or LinearRecipe())
    return state, begin(started, state)


@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_weights_are_those_that_were_asked_for(earlier, tmp_path, weights):
    out, saved = earlier
    state, progress = begun(tmp_path, {"from": str(out), "weights": weights})
    averages = dict(zip(saved["names"], saved["ema"]["average"], strict=True))
    for name, own in zip(state.names, state.parameters, strict=True):
        raw = saved["parts"]["layer"][name.removeprefix("layer.")]
        assert torch.equal(own, averages[name] if weights == "averaged" else raw)
        assert not torch.equal(averages[name], raw)
    assert all(map(torch.equal, state.ema.average, state.parameters)), "a new average begins at the weights"
    assert (state.ema.steps, state.optimizer.state_dict()["state"]) == (0, {})
    assert (progress.step, progress.offset, progress.samples) == (0, 0, 0)


def test_moments_average_and_position_go_on_if_asked(earlier, tmp_path):
    out, saved = earlier
    asked = dict(weights="raw", moments=True, averages=True, position=True)
    state, progress = begun(tmp_path, {"from": str(out), **asked})
    assert all(map(torch.equal, state.ema.average, saved["ema"]["average"]))
    assert state.ema.steps == saved["ema"]["steps"] == 5
    taken = state.optimizer.state_dict()["state"]
    for i, moments in saved["optimizer"]["state"].items():
        assert all(torch.equal(taken[i][key], moments[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert progress.offset == 5 * 4
    assert progress.history[-1]["their_step"] == 5


def test_a_stage_that_takes_everything_is_the_run_that_was_not_divided(tmp_path):
    """Three stages of one configuration end with the bits of one run."""
    constant = dict(schedule="constant", warmup_steps=0)
    whole = run(tmp_path / "whole", optimizer=constant | {"steps": 6}, **RARE)
    everything = dict(weights="raw", moments=True, averages=True, position=True)
    run(tmp_path / "0", optimizer=constant | {"steps": 2}, **RARE)
    for i in (1, 2):
        init = {"from": str(tmp_path / str(i - 1)), **everything}
        stage = run(tmp_path / str(i), optimizer=constant | {"steps": 2}, init=init, **RARE)
    assert all(torch.equal(whole[key], stage[key]) for key in whole)
    card = json.loads((tmp_path / "2/model/card.json").read_text())
    assert [entry["init"]["from"] for entry in card["history"]] == [str(tmp_path / "0"), str(tmp_path / "1")]


def test_a_stage_goes_on_when_what_it_began_with_is_gone(earlier, tmp_path):
    shutil.copytree(earlier[0], tmp_path / "one")
    init = {"from": str(tmp_path / "one"), "position": True}
    whole = run(tmp_path / "whole", init=init)
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), init=init)
    shutil.rmtree(tmp_path / "one")
    again = run(tmp_path / "cut", init=init)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert load_state(tmp_path / "cut/states")["offset"] == 20


def test_a_single_state_can_be_named(earlier, tmp_path):
    first = state_files(earlier[0] / "states")[-1]
    state, progress = begun(tmp_path, {"from": str(first), "weights": "raw"})
    assert progress.history[-1]["their_step"] == 4
    assert torch.equal(state.parameters[0], torch.load(first)["parts"]["layer"]["weight"])


def test_what_cannot_be_begun_with_is_refused_and_left_alone(earlier, tmp_path):
    with pytest.raises(UserError, match="is no state and holds none"):
        begun(tmp_path, {"from": str(tmp_path / "nothing")})
    larger = LinearRecipe()
    larger.layer = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match="trained 'layer', which is none of what this run trains"):
        begun(tmp_path, {"from": str(earlier[0])}, larger)
    damaged = tmp_path / "step-00000001.pt"
    damaged.write_bytes(state_files(earlier[0] / "states")[0].read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read"):
        begun(tmp_path, {"from": str(damaged)})
    assert damaged.exists()
    with pytest.raises(ValueError, match="only adamw goes on"):
        config(tmp_path, init={"from": "x", "moments": True}, optimizer={"name": "prodigy"})


def test_the_configuration_is_written_as_it_is_read(earlier, tmp_path):
    init = {"from": str(earlier[0]), "weights": "raw"}
    train(config(tmp_path, init=init, **RARE, optimizer=dict(steps=1, warmup_steps=0)), LinearRecipe())
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["init"]["from"] == str(earlier[0])
    assert RunConfig.model_validate(written).init.weights == "raw"
