"""Copies of states that are made beside training: what they hold is what was, whatever changes when."""

import os
import signal
import threading

import pytest
import torch
from late_copies import copy_late
from linear_run import LinearRecipe, config, run
from torch import nn

from bdm.errors import UserError
from bdm.parallel.whole import on_cpu
from bdm.training import copying
from bdm.training.copying import Copies
from bdm.training.loop import Stopped
from bdm.training.resuming import Progress, _take_up, save
from bdm.training.setup import set_up
from bdm.training.states import StateWriter, load_state, state_files
from bdm.training.stopping import StopSignal


def room(tensor):
    return torch.empty_like(tensor, device="cpu")


def tensors():
    torch.manual_seed(0)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    return [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(5, 7).t(),
        torch.randn(6, 8)[:, ::2],
        torch.zeros(0, 3),
        torch.tensor(3.0),
        torch.randn(9, dtype=torch.bfloat16),
        torch.arange(12),
        nn.Parameter(odd),
    ]


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("least", [0, 60])
def test_steady_tensors_are_copied_later_and_all_others_at_once(monkeypatch, least):
    monkeypatch.setattr(copying, "LEAST", least)
    steady, others = tensors(), tensors()
    copies = Copies(room, steady)
    made = [[copies(tensor) for tensor in group] for group in (steady, others)]
    later = {id(copy) for copy, *_ in copies._due}
    wanted = [t.nbytes >= max(1, least) for t in steady]
    assert [id(copy) in later for copy in made[0]] == wanted
    assert not later & {id(copy) for copy in made[1]}
    with torch.no_grad():
        for tensor in others:  # nobody promised that these stay
            tensor.zero_()
    copies.make()
    copies.wait()
    copies.check()
    for group in made:
        for copy, was in zip(group, tensors(), strict=True):
            assert bits(copy) == bits(was)
            assert copy.stride() == room(was).stride()


def test_a_part_of_a_steady_tensor_is_none(monkeypatch):
    """What is not recognised completely is copied at once."""
    monkeypatch.setattr(copying, "LEAST", 0)
    whole = torch.randn(4, 4)
    copies = Copies(room, [whole])
    for part in (whole[:2], whole.t(), whole.view(16), whole.view(torch.int32)):
        copies(part)
    assert not copies._due
    copies(whole.detach())
    assert len(copies._due) == 1


def test_what_changes_meanwhile_is_no_state(tmp_path, monkeypatch):
    """A tensor that was called steady and is not: refused, and the state before stays."""
    monkeypatch.setattr(copying, "LEAST", 0)
    weight, writer = torch.zeros(3), StateWriter()
    writer.write(tmp_path, 1, {"weight": writer.next()(weight)})
    copy = writer.next([weight])
    content = {"weight": copy(weight)}
    weight += 1
    writer.write(tmp_path, 2, content)
    with pytest.raises(UserError, match="step 2 cannot be written.*changed meanwhile.*background_states"):
        writer.wait()
    writer.write(tmp_path, 3, {"weight": writer.next([weight])(weight)})
    writer.close()
    assert [load_state(tmp_path)["weight"].tolist(), len(state_files(tmp_path))] == [[1.0] * 3, 2]


class NormalisedRecipe(LinearRecipe):
    """Has buffers that change in forward passes, dropout, and now and then a loss that is not finite."""

    bad = ()

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            nn.BatchNorm1d(3), nn.Linear(3, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        self.calls = 0

    def forward(self, batch):
        self.calls += self.training
        terms = super().forward(batch)
        return {"loss": terms["loss"] * (float("nan") if self.training and self.calls in self.bad else 1)}


class NaNRecipe(NormalisedRecipe):
    bad = (3, 7, 8)


class ClampedRecipe(NormalisedRecipe):
    """Its forward pass changes weights behind autograd's back."""

    def forward(self, batch):
        if self.training:
            self.layer[1].weight.data.mul_(0.99)
        return super().forward(batch)


class RenormedRecipe(NormalisedRecipe):
    """So do rows of an embedding that has a largest norm."""

    def __init__(self):
        super().__init__()
        self.layer.append(nn.Linear(1, 1))
        self.table = nn.Embedding(2, 3, max_norm=0.01)

    def parts(self):
        return {"layer": self.layer, "table": self.table}

    def forward(self, batch):
        terms = super().forward(batch)
        return {"loss": terms["loss"] + self.table(torch.tensor([0, 1])).square().sum()}


RUNS = [
    (NormalisedRecipe, {}),
    (NormalisedRecipe, {"accumulation": 2}),
    (NormalisedRecipe, {"ema_device": "cpu"}),
    (NaNRecipe, {}),
    (ClampedRecipe, {}),
    (RenormedRecipe, {}),
]


def states_of(folder):
    return {path.name: torch.load(path) for path in state_files(folder / "states")}


@pytest.mark.parametrize(("recipe", "optimizer"), RUNS)
def test_states_are_those_of_a_run_that_waits_bit_for_bit(tmp_path, monkeypatch, recipe, optimizer):
    kept = dict(checkpoint_every=1, keep_last=99, optimizer=optimizer)
    blocking = run(tmp_path / "blocking", recipe(), background_states=False, **kept)
    late = copy_late(monkeypatch)
    if recipe is ClampedRecipe:
        monkeypatch.setattr("bdm.training.setup.KNOWN", ("bdm", "torch"))
    beside = run(tmp_path / "beside", recipe(), **kept)
    # Moments are there from the first step on; weights wait where it is known that they may.
    weights = [(8, 3)] * 3 if recipe in (NormalisedRecipe, NaNRecipe) else [(8, 3)] * 2
    assert late.count((8, 3)) >= 10 * len(weights) + 2
    assert all(torch.equal(blocking[key], beside[key]) for key in blocking)
    ours, theirs = states_of(tmp_path / "beside"), states_of(tmp_path / "blocking")
    assert list(ours) == list(theirs)
    for step in ours:
        leaves = [torch.utils._pytree.tree_leaves_with_path(states[step]) for states in (ours, theirs)]
        for (path, one), (other_path, other) in zip(*leaves, strict=True):
            assert path == other_path
            assert one == other if not isinstance(one, torch.Tensor) else bits(one) == bits(other), path


CHANGES = {
    "step": lambda state: state.optimizer.step(),
    "average": lambda state: state.ema.step(),
    "swap": lambda state: state.ema._swap(),
    "load": lambda state: _take_up(state, state.earlier),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_weights_waits_for_their_copy(tmp_path, monkeypatch, change):
    copy_late(monkeypatch, patience=0)
    begun, go = threading.Event(), threading.Event()
    plain = copying._copy

    def slow(copy, source):
        begun.set()
        assert go.wait(20)
        plain(copy, source)

    settings = config(tmp_path)
    state = set_up(settings, NormalisedRecipe())
    train_a_step(state)
    save(settings, state, Progress(step=1))
    object.__setattr__(state, "earlier", load_state(tmp_path / "states"))
    train_a_step(state)
    want = [on_cpu(t.detach()) for t in everything(state)]
    for parameter in state.parameters:
        parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(copying, "_copy", slow)
    writer = StateWriter()
    save(settings, state, Progress(step=2), writer)
    changing = threading.Thread(target=CHANGES[change], args=(state,))
    changing.start()
    assert begun.wait(20)
    changing.join(0.2)
    assert changing.is_alive(), "it waits"
    assert [bits(t) for t in everything(state)] == [bits(t) for t in want]
    go.set()
    changing.join()
    writer.wait()
    assert [bits(t) for t in everything(state)] != [bits(t) for t in want]
    saved = load_state(tmp_path / "states")
    assert saved["step"] == 2
    fresh = set_up(config(tmp_path / "fresh"), NormalisedRecipe())
    _take_up(fresh, saved)
    assert [bits(t) for t in everything(fresh)] == [bits(t) for t in want]
    writer.close()


def train_a_step(state):
    for parameter in state.parameters:
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.ema.step()
    state.optimizer.zero_grad()


def everything(state):
    moments = [t for p in state.parameters for t in state.optimizer.state[p].values()]
    return [*state.parameters, *state.ema.average, *moments]


def test_a_copy_that_fails_is_told_and_leaves_the_state_before(tmp_path, monkeypatch):
    copy_late(monkeypatch)
    plain, calls = copying._copy, []

    def fail(copy, source):
        calls.append(1)
        if len(calls) > 60:  # in the second state
            raise MemoryError("no memory left")
        plain(copy, source)

    monkeypatch.setattr(copying, "_copy", fail)
    with pytest.raises(UserError, match="cannot be written.*no memory left.*the one before it is intact"):
        run(tmp_path, NormalisedRecipe(), checkpoint_every=2)
    monkeypatch.setattr(copying, "_copy", plain)
    assert load_state(tmp_path / "states")["step"] == 2
    again = run(tmp_path, NormalisedRecipe(), checkpoint_every=2)
    assert all(
        torch.equal(again[key], value) for key, value in run(tmp_path / "w", NormalisedRecipe()).items()
    )


def test_a_signal_right_behind_a_state(tmp_path, monkeypatch):
    """The copy is not made yet when the signal comes in the next step."""
    copy_late(monkeypatch)

    class Signalled(NormalisedRecipe):
        def forward(self, batch):
            if self.training and self.calls == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch)

    whole = run(tmp_path / "whole", NormalisedRecipe())
    with StopSignal(), pytest.raises(Stopped) as stopped:
        run(tmp_path / "cut", Signalled())
    assert stopped.value.step == 5
    assert [path.name for path in state_files(tmp_path / "cut/states")] == [
        "step-00000005.pt",
        "step-00000004.pt",
    ]
    again = run(tmp_path / "cut", NormalisedRecipe())
    assert all(torch.equal(whole[key], again[key]) for key in whole)
