"""A process that writes states: the same files, whatever becomes of it."""

import os
import signal

import pytest
import torch
from linear_run import Stop, StoppingRecipe, run

from bdm.parallel.whole import collected, whole
from bdm.training import state_process
from bdm.training.state_process import SharedBuffers, StateProcess, torch_save
from bdm.training.states import StateWriter, load_state


def some_state():
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    return {
        "weights": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(0, 3), shared],
        "again": shared,
        "step": torch.tensor(7.0),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "plain": {"name": "x", "rates": [0.1, None], "many": torch.arange(5)[::2]},
    }


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


def test_buffers_are_used_again_and_hold_what_was_copied(monkeypatch):
    monkeypatch.setattr(state_process, "SEGMENT", 4096)
    buffers, sizes = SharedBuffers(), []
    for _ in range(3):
        buffers.reset()
        tensors = [torch.randn(n, 7) for n in (1, 40, 300, 2)] + [torch.randn(5, 6).t()]
        copies = [buffers.copy(tensor) for tensor in tensors]
        assert all(map(torch.equal, tensors, copies))
        assert [copy.stride() for copy in copies] == [tensor.stride() for tensor in tensors]
        places = [buffers.place_of(copy) for copy in copies]
        assert len(set(places)) == len(places)
        assert None not in places
        sizes.append(buffers.size)
    assert len(set(sizes)) == 1
    assert buffers.place_of(torch.zeros(3)) is None
    buffers.close()


def test_the_process_writes_the_file_that_this_one_would_and_is_replaced_when_it_is_killed(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(state_process, "LEAST", 0)
    buffers = SharedBuffers()
    process = StateProcess(buffers)
    for turn in range(3):
        buffers.reset()
        copy = collected(some_state(), whole(True, buffers.copy))
        process.save(copy, tmp_path / "theirs.pt")
        torch_save(copy, tmp_path / "ours.pt")
        theirs, ours = (torch.load(tmp_path / f"{name}.pt") for name in ("theirs", "ours"))
        for one, other, was in zip(flat(theirs), flat(ours), flat(some_state()), strict=True):
            assert one == other if not isinstance(one, torch.Tensor) else torch.equal(one, was)
        assert theirs["weights"][0].is_contiguous(memory_format=torch.channels_last)
        if turn == 0:
            with pytest.raises(OSError, match="No such file"):
                process.save(copy, tmp_path / "nowhere/x.pt")
            assert process._process.poll() is None, "it goes on"
        if turn == 1:  # as the kernel does when memory is short
            os.kill(process._process.pid, signal.SIGKILL)
    assert "the process that writes states is lost" in caplog.text
    process.close()
    buffers.close()


def test_a_run_whose_states_another_process_writes_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole_run = run(tmp_path / "whole")
    monkeypatch.setattr(state_process, "LEAST", 0)
    asked, plain = [], StateProcess._asked
    monkeypatch.setattr(StateProcess, "_asked", lambda self, *job: (asked.append(1), plain(self, *job))[1])
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe())
    assert asked
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole_run[key], again[key]) for key in whole_run)
    assert load_state(tmp_path / "cut/states")["step"] == 12


def test_the_next_state_waits_for_the_one_before(tmp_path):
    writer = StateWriter()
    for step in range(1, 6):
        copy = collected({"weight": torch.full((3,), float(step))}, whole(True, writer.next()))
        writer.write(tmp_path, step, copy, 9)
    writer.wait()
    files = sorted((tmp_path).glob("step-*.pt"))
    assert [torch.load(path)["weight"].tolist() for path in files] == [[float(n)] * 3 for n in range(1, 6)]
    writer.close()
