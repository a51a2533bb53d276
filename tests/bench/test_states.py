"""The stall of training by a state: its figures, at a size that takes no time."""

import threading
import time

from bdm.bench import states
from bdm.config import BenchStatesConfig


def test_the_figures_of_a_small_state(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "AROUND", 0.1)
    config = BenchStatesConfig(kind="states", out=tmp_path, folder=tmp_path, megabytes=30, pairs=2, warm_up=1)
    measured = states.measure(config)
    assert len(measured["ratios"]) == 2
    assert 0 < measured["begun_s"] + measured["copied_s"] <= 2 * measured["stall_s"]
    assert "in the background" in states.table(measured)
    states.draw_stalls(measured, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    assert not list(tmp_path.glob("bdm-bench-*"))


def test_the_clock_counts_waiting_for_a_lock_and_not_for_a_processor():
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    begin, wall = states.clock(), time.perf_counter()
    with lock:
        counted, passed = states.clock() - begin, time.perf_counter() - wall
    assert 0.1 < counted <= passed + 0.01
