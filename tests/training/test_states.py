"""States on disk: the newest whole one counts, whatever happened to the others."""

import threading
import zipfile

import pytest
import torch
from linear_run import Stop, StoppingRecipe, run

from bdm import files
from bdm.errors import UserError
from bdm.parallel.whole import gathered, part_state, whole
from bdm.training import state_reading, states
from bdm.training.places import step_of


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
        patched.setattr(state_reading.zipfile, "ZipFile", fail)
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
    steps = [step_of(path) for path in states.state_files(tmp_path / "states")]
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


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """What is written is what was, whatever changes meanwhile; the next one waits for it."""
    begun, go = threading.Event(), threading.Event()
    plain = files._sync

    def slow(path):
        begun.set()
        assert go.wait(20)
        plain(path)

    monkeypatch.setattr(files, "_sync", slow)
    writer = states.StateWriter()
    weight = torch.zeros(3)
    writer.write(tmp_path, 1, gathered({"weight": weight}, keep=True))
    assert begun.wait(20)
    weight += 1
    assert not states.state_files(tmp_path), "whole or not there"
    go.set()
    writer.write(tmp_path, 2, gathered({"weight": weight}, keep=True))
    writer.wait()
    saved = [torch.load(path)["weight"] for path in states.state_files(tmp_path)[::-1]]
    assert [tensor.tolist() for tensor in saved] == [[0.0] * 3, [1.0] * 3]


def test_a_disk_that_fills_up_meanwhile_is_told_at_the_next_state(tmp_path, monkeypatch):
    states.save_state(tmp_path, 1, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    writer = states.StateWriter()
    writer.write(tmp_path, 2, {"step": 2})
    with pytest.raises(UserError, match="the state of step 2 cannot be written"):
        writer.write(tmp_path, 3, {"step": 3})
    writer.write(tmp_path, 3, {"step": 3})
    writer.close()
    monkeypatch.undo()
    assert states.load_state(tmp_path) == {"step": 1}


def test_weights_that_are_one_stay_one_in_a_state(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[1].weight = network[0].weight
    state = part_state(network, whole(keep=True))
    assert state["0.weight"] is state["1.weight"]
    assert state["0.weight"].data_ptr() != network[0].weight.data_ptr()


def test_the_best_state_stays(tmp_path):
    for step in range(1, 6):
        states.save_state(tmp_path, step, {"step": step}, 1, 0, 2)
    assert [step_of(path) for path in states.state_files(tmp_path)] == [5, 2]
