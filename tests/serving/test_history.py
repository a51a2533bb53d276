"""The journal: what a killed server drew is there, and what it did not is told.

``BDM_KILLS`` says how often the slow test kills.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import httpx
import pytest
from PIL import Image
from serving_running import running

from bdm.drawing.painter import Drawn
from bdm.drawing.request import Request
from bdm.errors import UserError
from bdm.serving.history import End, History, new_id

KILLS = int(os.environ.get("BDM_KILLS", "20"))
PICTURE = Drawn(Image.new("RGB", (8, 8)), Request(prompt="龙"))


def test_what_has_no_end_is_lost_once(tmp_path):
    history = History(tmp_path)
    names = [new_id() for _ in range(4)]
    for name in names:
        history.accept(name, Request(prompt=name), "jobs")
    history.keep(names[0], PICTURE)
    history.end(End(names[1], "failed", "why"))
    PICTURE.save(tmp_path / "pictures" / f"{names[2]}.png")  # killed between the picture and its line
    history.close()
    again = History(tmp_path)
    assert [(end.id, end.request["prompt"]) for end in again.lost] == [(names[3], names[3])]
    assert (again.ended(names[1]).status, again.ended(names[3]).status) == ("failed", "lost")
    assert again.page() == [names[2], names[0]][:: 1 if names[2] > names[0] else -1]
    again.close()
    third = History(tmp_path)
    assert third.lost == []
    assert third.ended(names[3]).status == "lost"
    third.close()


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    history = History(tmp_path)
    name = new_id()
    history.accept(name, Request(), "jobs")
    history.close()
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'[]\n5\n{"event": "accepted", "id": "../x"}\n\xff\xfe\n{"event": "acc')
    again = History(tmp_path)
    assert [end.id for end in again.lost] == [name]
    again.close()
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert json.loads(lines[-1]) == {"event": "lost", "id": name, "why": again.lost[0].why}


def test_two_servers_do_not_share_a_folder(tmp_path):
    history = History(tmp_path)
    with pytest.raises(UserError, match="another running server's"):
        History(tmp_path)
    history.close()
    History(tmp_path).close()


def test_a_long_journal_begins_anew_with_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("bdm.serving.history._LONG_JOURNAL", 1000)
    history = History(tmp_path)
    names = [new_id() for _ in range(10)]
    for name in names:
        history.accept(name, Request(), "jobs")
        history.end(End(name, "failed", "why"))
    history.close()
    before = (tmp_path / "journal.jsonl").stat().st_size
    again = History(tmp_path)
    assert again.lost == []
    assert {again.ended(name).status for name in names} == {"failed"}
    again.close()
    assert (tmp_path / "journal.jsonl").stat().st_size < before / 5


KILLED = """
import sys, asyncio
sys.path[:0] = {path!r}
from pathlib import Path
from serving_fake import FakeEngine
from bdm.serving.app import Settings, build
from bdm.serving.server import listening, run
bound = listening("127.0.0.1", 0)
served = build(Settings(history=Path({folder!r}), grace=5), lambda library: FakeEngine(library, 0.02))
run(served, bound, lambda: print(bound.getsockname()[1], flush=True))
print("stopped")
"""


def started(folder):
    path = [os.path.dirname(os.path.dirname(__file__)), os.getcwd()]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(path=path, folder=str(folder))],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_kill_and_restart_lose_no_finished_picture_and_tell_the_lost(tmp_path, kills):
    chance, seen = random.Random(kills), {}
    for _ in range(kills):
        process, port = started(tmp_path)
        address = f"http://127.0.0.1:{port}/v1/jobs"
        body = {"request": {"prompt": "龙", "steps": 100}, "count": 16}
        names = [job["id"] for job in httpx.post(address, json=body).json()["jobs"]]
        done, wanted = set(), chance.randint(1, 3)
        while len(done) < wanted:
            done = {name for name in names if httpx.get(f"{address}/{name}").json()["status"] == "done"}
            time.sleep(0.02 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with running(tmp_path) as again:
            found = {name: again.client.get(f"/v1/jobs/{name}").json() for name in (*names, *seen)}
            assert {found[name]["status"] for name in done} == {"done"}
            assert {one["status"] for one in found.values()} == {"done", "lost"}
            assert all(found[name]["status"] == status for name, status in seen.items())
            seen = {name: one["status"] for name, one in found.items()}
            told = [one["id"] for one in again.client.get("/v1/jobs").json()["lost"]]
            assert told == [name for name in names if seen[name] == "lost"]
            for name in seen:
                if seen[name] == "done":
                    again.client.get(found[name]["picture"]).raise_for_status()


def test_sigterm_finishes_what_was_accepted(tmp_path):
    process, port = started(tmp_path)
    body = {"request": {"prompt": "龙", "steps": 10}, "count": 3}
    httpx.post(f"http://127.0.0.1:{port}/v1/jobs", json=body).raise_for_status()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=300)[0].endswith("stopped\n")
    assert process.returncode == 0
    history = History(tmp_path)
    assert (len(history.page()), history.lost) == (3, [])
    history.close()
