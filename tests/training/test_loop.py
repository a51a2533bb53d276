import json
import math
import os
import random
import signal
import time
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from bdm import files
from bdm.config import RunConfig
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.training import states
from bdm.training.loop import Stopped, train
from bdm.training.metrics import plot_metrics, read_metrics
from bdm.training.optimizers import learning_rate
from bdm.training.recipes.base import Recipe


class LinearRecipe(Recipe):
    """A small recipe with randomness per sample: the loop must know nothing else."""

    def __init__(self):
        super().__init__(EmojiSource(World(), limit=2))
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.frozen = nn.Linear(3, 1)

    def parts(self):
        return {"layer": self.layer}

    def forward(self, batch):
        x = batch.pixels.float().mean((2, 3)) / 255 + 0.1 * batch.randn(3)
        return {"loss": (self.layer(x) - self.frozen(x)).square().mean()}

    def save(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.layer.state_dict(), folder / "layer.pt")


def config(out, **changes):
    optimizer = dict(steps=12, batch_size=4, learning_rate=0.05, warmup_steps=2, ema_decay=0.9) | changes.pop(
        "optimizer", {}
    )
    recipe, data = dict(kind="autoencoder", model={}), dict(kind="emoji", limit=2)
    frequent = dict(log_every=2, validate_every=4, grid_every=4, checkpoint_every=4, trackers=())
    return RunConfig(out=out, recipe=recipe, data=data, optimizer=optimizer, **frequent | changes)


def run(out, recipe=None, **changes):
    out.mkdir(exist_ok=True)
    folder = train(config(out, **changes), recipe or LinearRecipe(), "python train.py")
    return torch.load(folder / "layer.pt", weights_only=True)


class Stop(Exception):
    pass


class StoppingRecipe(LinearRecipe):
    def forward(self, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.training and self.calls > 9:
            raise Stop
        return super().forward(batch)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe())
    assert not (tmp_path / "cut/model").exists()
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    for out in ("whole", "cut"):
        assert [row["step"] for row in read_metrics(tmp_path / out) if "loss" in row] == [2, 4, 6, 8, 10, 12]


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


def test_a_resume_between_two_log_rows_logs_a_mean(tmp_path):
    """The checkpoint at step 8 lies inside the row of steps 7 to 12, so the resumed row is the mean of steps
    9 to 12.
    """
    run(tmp_path / "every", log_every=1)
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), log_every=6)
    run(tmp_path / "cut", log_every=6)
    single = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "every") if "loss" in row}
    rows = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "cut") if "loss" in row}
    assert rows[12] == pytest.approx(sum(single[i] for i in (9, 10, 11, 12)) / 4, rel=1e-4)


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


def test_changed_configuration_is_refused_with_the_difference(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.05 -> 0.01"):
        run(tmp_path, optimizer=dict(learning_rate=0.01))
    run(tmp_path, log_every=5, keep_last=1)  # these do not change the result


def flip_a_bit_of_a_tensor(path):
    """Damage that a plain load does not notice."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        header = next(entry.header_offset for entry in archive.infolist() if "/data/" in entry.filename)
    name, extra = (int.from_bytes(content[header + i : header + i + 2], "little") for i in (26, 28))
    content[header + 30 + name + extra] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, caplog):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe())
    newest, older = states.state_files(tmp_path / "cut/states")
    assert (newest.name, older.name) == ("step-00000008.pt", "step-00000004.pt")
    flip_a_bit_of_a_tensor(newest)
    again = run(tmp_path / "cut")
    assert "trying the one before it" in caplog.text
    assert newest.with_name("step-00000008.pt.damaged").exists(), "set aside, and written anew by the run"
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    for path in states.state_files(tmp_path / "cut/states"):
        path.write_bytes(path.read_bytes()[:100])
    for _ in range(2):  # what the first start set aside does not make the second one begin anew
        with pytest.raises(UserError, match="none of the 2 states"):
            run(tmp_path / "cut")


def test_a_damaged_state_takes_the_place_of_no_good_one(tmp_path):
    for step in (1, 2):
        states.save_state(tmp_path, step, {"step": step})
    newest, older = states.state_files(tmp_path)
    newest.write_bytes(newest.read_bytes()[:50])
    assert states.load_state(tmp_path) == {"step": 1}
    states.save_state(tmp_path, 3, {"step": 3}, keep_last=2)
    assert [path.name for path in states.state_files(tmp_path)] == ["step-00000003.pt", older.name]


def test_a_state_that_cannot_be_read_for_now_is_left_in_place(tmp_path, monkeypatch):
    states.save_state(tmp_path, 1, {"step": 1})

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(states.zipfile, "ZipFile", fail)
        with pytest.raises(UserError, match="none of the 1 states"):
            states.load_state(tmp_path)
    assert states.load_state(tmp_path) == {"step": 1}


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    states.save_state(tmp_path, 1, {"step": 1})
    (tmp_path / ".step-00000002.pt.partial").write_bytes(b"half")
    assert states.load_state(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_old_states_go_and_every_nth_stays(tmp_path):
    run(tmp_path, checkpoint_every=1, keep_last=2, keep_every=5)
    steps = [states._step_of(path) for path in states.state_files(tmp_path / "states")]
    assert steps == [12, 11, 10, 5]
    assert not [path for path in (tmp_path / "states").iterdir() if path.name.startswith(".")]


def test_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    run(tmp_path, optimizer=dict(steps=12))
    before = states.state_files(tmp_path / "states")[0].read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        states.save_state(tmp_path / "states", 13, {"step": 13})
    assert states.state_files(tmp_path / "states")[0].read_bytes() == before
    assert len(list((tmp_path / "states").iterdir())) == 2


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


class DroppingRecipe(LinearRecipe):
    """Draws from torch's global generator, as dropout does."""

    def forward(self, batch):
        terms = super().forward(batch)
        return {"loss": terms["loss"] * (1 + torch.rand(()))}


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


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_do_not_change_the_result(tmp_path, workers):
    whole = run(tmp_path / "none")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.values(), run(tmp_path / "some", workers=workers).values(), strict=True)
    )


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


def test_a_look_that_a_signal_prevented_is_made_up_for(tmp_path):
    class Signalled(LinearRecipe):
        def forward(self, batch):
            self.calls = getattr(self, "calls", 0) + self.training
            if self.training and self.calls == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch)

    for stop in (4, 12):
        out = tmp_path / str(stop)
        recipe = Signalled()
        recipe.stop = stop
        with pytest.raises(Stopped):
            run(out, recipe, log_every=100)
        run(out, log_every=100)
        looks = [row["step"] for row in read_metrics(out) if "validation/loss" in row]
        assert looks == [4, 8, 12]
        assert json.loads((out / "model/card.json").read_text())["validation"]


def test_half_a_line_of_metrics_does_not_stop_a_run(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, StoppingRecipe())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [2, 4, 6, 8, 10, 12]


def test_a_refused_run_leaves_its_folder(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="another configuration"):
        run(tmp_path, optimizer=dict(learning_rate=0.01), trackers=("tensorboard",))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_skipped_steps_name_keys_where_a_source_has_them(tmp_path):
    recipe = NanRecipe({2})
    recipe.source.key = lambda index: f"shard.tar:{index}"
    run(tmp_path, recipe)
    (row,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert all(key.startswith("shard.tar:") for key in row["examples"])
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path) if "loss" in row)


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0)])
def test_a_resume_may_change_the_number_of_data_workers(tmp_path, first, then):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), workers=first)
    again = run(tmp_path / "cut", workers=then)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(("losses", "scale"), [((2.0, 0.5), "log"), ((2.0, -0.5), "linear")])
def test_losses_below_zero_are_shown(tmp_path, monkeypatch, losses, scale):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    plot_metrics(tmp_path)
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    assert axes.lines[0].get_ydata().tolist() == list(losses)


def test_learning_rate():
    optimizer = config(Path("x")).optimizer
    rates = [learning_rate(i, optimizer) for i in range(12)]
    assert rates[:3] == pytest.approx([0.025, 0.05, 0.05])
    assert rates[7] == pytest.approx(0.025)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_metrics_and_grids_go_to_the_trackers(tmp_path):
    """TensorBoard's own reader finds the rows of metrics.jsonl, the settings and the grid."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Drawing(LinearRecipe):
        def grid(self):
            return Image.new("RGB", (6, 4), "red")

    run(tmp_path, Drawing(), trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "trackers/bdm"))
    events.Reload()
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    found = events.Scalars("loss")
    assert [event.step for event in found] == [row["step"] for row in rows]
    assert [event.value for event in found] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert [(event.step, event.width, event.height) for event in events.Images("grid")] == [
        (4, 6, 4),
        (8, 6, 4),
        (12, 6, 4),
    ]
    settings = next((tmp_path / "trackers/bdm").rglob("hparams.yml")).read_text()
    assert "optimizer.steps: 12" in settings


def test_a_state_from_before_a_setting_existed_goes_on(tmp_path):
    run(tmp_path, optimizer=dict(steps=12))
    path = states.state_files(tmp_path / "states")[0]
    state = torch.load(path, weights_only=True)
    old = json.loads(state["run"])
    del old["optimizer"]["name"]
    torch.save(state | {"run": json.dumps(old)}, path)
    run(tmp_path, optimizer=dict(steps=12))
