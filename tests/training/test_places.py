"""States in a store: whole or not there, read back, pruned, whatever the store does meanwhile."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from linear_run import LinearRecipe, Stop, StoppingRecipe, config, run

from bdm.data import reading
from bdm.errors import UserError
from bdm.parallel.together import Together
from bdm.training import states
from bdm.training.places import place_of
from bdm.training.resuming import resume
from bdm.training.setup import set_up


class Faulty(MemoryFileSystem):
    """A store that fails so many times, or keeps half of what it is given."""

    protocol = "faulty"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    faults: ClassVar[Counter] = Counter()
    halve = ""

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("faulty://", "memory://"))

    def _stumble(self, what, path):
        if self.faults[what] > 0:
            self.faults[what] -= 1
            raise ConnectionError(f"503 {what} {path}")

    def put_file(self, lpath, rpath, **options):
        self._stumble("put", rpath)
        super().put_file(lpath, rpath, **options)
        if self.halve and self.halve in rpath:
            self.pipe_file(rpath, self.cat_file(rpath)[:50])

    def pipe_file(self, path, value, **options):
        if path.endswith("index.json"):
            self._stumble("index", path)
        super().pipe_file(path, value, **options)

    def find(self, path, **options):
        self._stumble("find", path)
        return super().find(path, **options)

    def cat_file(self, path, **options):
        self._stumble("cat", path)
        return super().cat_file(path, **options)

    def rm_file(self, path):
        self._stumble("rm", path)
        super().rm_file(path)


@pytest.fixture
def store(monkeypatch):
    """A fresh store, asked again at once where it stumbles."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.store.clear()
    Faulty.faults.clear()
    monkeypatch.setattr(Faulty, "halve", "")
    monkeypatch.setattr(reading, "STORE_WAITS", (0.0,) * 3)
    return "faulty://run/states"


def test_a_run_whose_states_are_in_a_store_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    url = f"memory://{tmp_path.name}/states"
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), states=url)
    assert place_of(url).entries() == ["step-00000008", "step-00000004"]
    again = run(tmp_path / "cut", states=url)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert place_of(url).entries() == ["step-00000012", "step-00000008"]
    assert not (tmp_path / "cut/states").exists()
    # The next stage finds them by the run's folder, or by their own.
    for origin in (str(tmp_path / "cut"), url, f"{url}/step-00000012"):
        assert states.find_state(origin) == f"{url}/step-00000012"


def test_a_store_that_stumbles_is_asked_again(store):
    Faulty.faults.update(put=2, index=2, find=2)
    states.save_state(store, 1, {"step": 1, "weight": torch.arange(3.0)})
    Faulty.faults.update(find=1, cat=2)
    saved = states.load_state(store)
    assert saved["step"] == 1
    assert saved["weight"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("what", ["put", "index"])
def test_a_store_that_stays_away_leaves_the_state_before(store, what):
    states.save_state(store, 1, {"step": 1})
    Faulty.faults.update({what: 99})
    with pytest.raises(UserError, match=r"the state of step 2 cannot be written to faulty.*503.*intact"):
        states.save_state(store, 2, {"step": 2})
    Faulty.faults.clear()
    assert states.load_state(store) == {"step": 1}
    # What was begun goes with the next one.
    states.save_state(store, 3, {"step": 3}, keep_last=1)
    names = place_of(store).names()
    assert {name.split("/")[0] for name in names} == {"step-00000003"}
    assert len(names) == 2


def test_a_store_that_cannot_be_listed_is_not_taken_for_an_empty_one(store):
    states.save_state(store, 1, {"step": 1})
    Faulty.faults.update(find=99)
    with pytest.raises(UserError, match="states cannot be listed"):
        states.load_state(store)


def test_half_a_file_is_noticed_when_it_is_written_and_when_it_is_read(store, monkeypatch, caplog):
    states.save_state(store, 1, {"step": 1})
    monkeypatch.setattr(Faulty, "halve", "step-00000002")
    with pytest.raises(UserError, match="the state of step 2 cannot be written.*bytes of"):
        states.save_state(store, 2, {"step": 2})
    monkeypatch.setattr(Faulty, "halve", "")
    states.save_state(store, 2, {"step": 2})
    (name,) = [name for name in place_of(store).names() if "00000002/whole" in name]
    path = f"/run/states/{name}"
    content = bytearray(Faulty().cat_file(path))
    content[len(content) // 2] ^= 1
    Faulty().pipe_file(path, bytes(content))
    assert states.load_state(store) == {"step": 1}
    assert "trying the one before it" in caplog.text
    assert place_of(store).entries() == ["step-00000001"], "set aside"
    states.save_state(store, 2, {"step": 2})
    assert states.load_state(store) == {"step": 2}


def test_old_states_in_a_store_go_and_kept_ones_stay(store):
    for step in range(1, 7):
        states.save_state(store, step, {"step": step}, 2, 4, 3)
    assert place_of(store).entries() == [f"step-0000000{step}" for step in (6, 5, 4, 3)]
    Faulty.faults.update(rm=99)
    states.save_state(store, 7, {"step": 7}, 1)  # written, whatever cannot be deleted
    assert states.load_state(store) == {"step": 7}


def test_the_same_step_again_is_whole_at_every_moment(store):
    states.save_state(store, 1, {"step": 1, "again": False})
    Faulty.faults.update(index=99)
    with pytest.raises(UserError):
        states.save_state(store, 1, {"step": 1, "again": True})
    Faulty.faults.clear()
    assert states.load_state(store) == {"step": 1, "again": False}
    states.save_state(store, 1, {"step": 1, "again": True})
    assert states.load_state(store) == {"step": 1, "again": True}
    index = json.loads(place_of(store).text("step-00000001/index.json"))
    assert len(place_of(store).names()) == 1 + len(index["files"])


def test_a_folder_that_was_copied_to_a_store_goes_on_there(tmp_path, store):
    run(tmp_path, optimizer=dict(steps=4))
    (path,) = states.state_files(tmp_path / "states")
    Faulty().put_file(str(path), f"/run/states/{path.name}")
    other = config(tmp_path, states=store)
    progress = resume(other, set_up(other, LinearRecipe()), ["optimizer.steps"])
    assert progress is not None
    assert progress.step == 4


class Seat(Together):
    """One of four processes, each a thread here, on so many machines."""

    several = True

    def __init__(self, number, machines, barrier, said):
        super().__init__()
        self.number, self.size, self.barrier, self.said = number, 4 // machines, barrier, said

    @property
    def machine(self):
        return self.number // self.size * self.size

    @property
    def first_of_machine(self):
        return self.number == self.machine

    def all(self, value):
        self.said[self.number] = value
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def wait(self):
        self.barrier.wait()


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_the_processes_of_a_machine_read_each_byte_once(tmp_path, store, monkeypatch, machines):
    run(tmp_path, states=store, optimizer=dict(steps=4))
    (entry,) = place_of(store).entries()
    held = {path: len(file.getvalue()) for path, file in Faulty.store.items() if entry in path}
    read: list[int] = []

    def noted(how):
        def reads(*given, **options):
            read.append(len(content := how(*given, **options)))
            return content

        return reads

    monkeypatch.setattr(Faulty, "cat_file", noted(Faulty.cat_file))
    monkeypatch.setattr(reading, "read_range", noted(reading.read_range))
    barrier, said = threading.Barrier(4), [None] * 4
    with ThreadPoolExecutor(4) as threads:
        seats = [Seat(number, machines, barrier, said) for number in range(4)]
        found = list(threads.map(lambda seat: states.read_state(f"{store}/{entry}", seat), seats))
    assert sum(read) == machines * sum(held.values())
    assert all(state["step"] == 4 for state in found)


def test_a_store_that_is_unknown_is_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run(tmp_path, states="nowhere://bucket/states")
