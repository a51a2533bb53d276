"""Single bad things: what a budget allows, what is tried again, and who takes whose place."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter

import fsspec
import numpy as np
import pytest
from PIL import Image

from bdm.data import reading
from bdm.data.batch import stream
from bdm.data.faults import Budget
from bdm.data.positions import neighbours, walk
from bdm.data.reading import ReadError, read_range, retried
from bdm.data.shards import ShardSource
from bdm.data.source import Example, UnreadableExample
from bdm.errors import UserError


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def pair(key, red=0, text="x"):
    return [(f"{key}.png", png((red, 0, 0))), (f"{key}.json", json.dumps({"caption": text}).encode())]


def shards(folder, members, **options):
    """A training shard of these members, and one for validation."""
    write_tar(folder / "0.tar", members)
    write_tar(folder / "1.tar", pair("v"))
    return ShardSource(str(folder / "*.tar"), size=8, captions={"caption": 1.0}, **options)


class Plain:
    """A source whose examples fail as they are told."""

    def __init__(self, count, bad, kind="unreadable", sizes=None):
        self.count, self.bad, self.kind, self.shard_sizes = count, set(bad), kind, sizes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise UnreadableExample(str(index), "bad", self.kind)
        return Example(str(index), captions=(str(index),), caption_weights=(1.0,))


def test_places_of_damaged_examples_are_spread_over_their_shard():
    source = Plain(400, range(100, 140), sizes=[200, 200])
    uses = Counter(i for b in stream(source, 0, 40, 10, 0, unreadable_limit=1.0) for i in b.indices)
    assert set(uses) == set(range(400)) - source.bad
    assert max(uses.values()) <= 5
    assert all(uses[i] == 1 for i in range(200, 400)), "others' shards are not read for them"


@pytest.mark.parametrize("count", [1, 2, 7, 12, 360])
def test_a_walk_comes_by_every_number_once(count):
    assert all(sorted(walk(count, seed)) == list(range(count)) for seed in range(40))
    assert list(walk(0, 3)) == []


def test_neighbours_are_of_the_bucket_and_pass_the_filters():
    source = Plain(12, (), sizes=[4, 4, 4])
    source.bucket_of = np.array([0, 1] * 6)
    source.kept = np.arange(12) != 6
    assert [group.tolist() for group in neighbours(source, 4)] == [[4], [8, 10], [0, 2]]


@pytest.mark.parametrize(("kind", "name"), [("read", "read_limit"), ("unreadable", "unreadable_limit")])
def test_each_kind_of_fault_has_its_limit(tmp_path, kind, name):
    source = Plain(400, range(0, 400, 10), kind)
    other = {"read_limit": 0.0, "unreadable_limit": 0.0, name: 0.2}
    faults = Counter()
    log = tmp_path / "faults.jsonl"
    list(stream(source, 0, 40, 10, 0, log=log, faults=faults, **other))
    assert faults == {"read" if kind == "read" else "sample": len(log.read_text().splitlines())}
    assert faults.total() >= 40
    with pytest.raises(UserError, match=name):
        list(stream(source, 0, 40, 10, 0, **{**other, name: 0.01}))


def test_filters_are_no_faults():
    budget = Budget(sample=0.0, read=0.0)
    budget.spend(500, [UnreadableExample("k", "small", "size")] * 400)
    assert not budget.counts


def test_what_fails_once_is_read_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    answers = [OSError(5, "EIO"), TimeoutError(), ValueError("503"), b"x"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retried(read, "s3://b/x") == b"x"
    assert len(pauses) == 3
    assert sorted(pauses) == pauses
    assert sum(reading.STORE_WAITS) > 60, "a store may be away for a minute"
    answers = [FileNotFoundError("gone"), b"x"]
    with pytest.raises(ReadError, match="gone"):
        retried(read, "s3://b/x")
    assert answers == [b"x"], "what is not there is not asked for again"


def test_a_store_that_stays_away_costs_a_sample(tmp_path, monkeypatch):
    source = shards(tmp_path, pair("a") + pair("b", 9))
    monkeypatch.setattr(reading.time, "sleep", lambda _: None)
    real, tried = reading._read_bytes, Counter()

    def flaky(url, offset, size, *place):
        tried[offset] += 1
        if offset == min(tried):
            raise OSError(5, "Input/output error")
        return real(url, offset, size, *place)

    monkeypatch.setattr(reading, "_read_bytes", flaky)
    with pytest.raises(UnreadableExample, match="Input/output error") as error:
        source[0]
    assert error.value.kind == "read"
    assert source[1].pixels[0, 0, 0] == 9
    assert max(tried.values()) == len(reading.DISK_WAITS) + 1


def test_a_file_that_was_cut_is_read_as_far_as_it_goes(tmp_path, monkeypatch):
    source = shards(tmp_path, pair("a") + pair("b"))
    monkeypatch.setattr(reading.time, "sleep", lambda _: None)
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(int(source.shards[0].index.places[1, 0]) + 10)
    assert source[0].caption == "x"
    with pytest.raises(UnreadableExample, match="ends .* bytes early"):
        source[1]


@pytest.mark.parametrize("bad", [b"", b"x" * 3000, None])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_shard_that_is_not_whole_is_left_out(tmp_path, bad, number, caplog):
    for k in range(6):
        write_tar(tmp_path / f"{k}.tar", pair(f"{k}", k))
    path = tmp_path / f"{number}.tar"
    if bad is None:
        path.unlink()
    else:
        path.write_bytes(bad)
    source = ShardSource(str(tmp_path / "{0..5}.tar"), size=8, captions={"caption": 1.0})
    seen = {source[i].pixels[0, 0, 0].item() for i in range(len(source))}
    seen |= {source.validation[i].pixels[0, 0, 0].item() for i in range(len(source.validation))}
    assert seen == set(range(6)) - {number}
    assert len(source.validation) == 1
    assert f"{number}.tar" in caplog.text
    (tmp_path / f"{(number + 1) % 6}.tar").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 6 shards are not whole"):
        ShardSource(str(tmp_path / "{0..5}.tar"), size=8)


def test_a_store_that_fails_while_shards_are_opened_ends_the_start(tmp_path, monkeypatch):
    """Another process might read it, and then their orders would differ."""
    monkeypatch.setattr(reading.time, "sleep", lambda _: None)
    monkeypatch.setattr("bdm.data.tar._scan", lambda *_: (_ for _ in ()).throw(OSError(5, "EIO")))
    with pytest.raises(UserError, match="start again"):
        shards(tmp_path, pair("a"))


def texts(source):
    return {source[i].pixels[0, 0, 0].item(): source[i].caption for i in range(len(source))}


def test_no_picture_gets_the_text_of_another_of_its_name(tmp_path):
    one, two = pair("a", 10, "ten"), pair("a", 20, "twenty")
    assert texts(shards(tmp_path, one + two + pair("b", 30, "thirty"))) == {10: "ten", 30: "thirty"}
    assert texts(shards(tmp_path, one + pair("b", 30, "thirty") + two)) == {10: "ten", 30: "thirty"}
    assert texts(shards(tmp_path, one + two[:1])) == {10: "ten"}
    source = shards(tmp_path, [one[0], two[0], one[1], two[1]])
    with pytest.raises(UnreadableExample, match="no caption"):
        source[0]


def test_names_with_dots_are_names(tmp_path):
    members = pair("photo.v2", 10, "v2") + pair("photo.v3", 20, "v3") + pair("d.x/plain", 30, "plain")
    mask = [("plain2.mask.png", png((99, 0, 0)))]
    hidden = [("._photo.png", b"AppleDouble"), (".b.png", b"")]
    assert texts(shards(tmp_path, hidden + mask + members + pair("plain2", 40, "40"))) == {
        10: "v2", 20: "v3", 30: "plain", 40: "40"
    }  # fmt: skip


def test_a_chinese_text_beside_good_json(tmp_path):
    text = "一只白猫坐在红色的椅子上".encode("gbk")
    source = shards(tmp_path, [*pair("a", 1, "json"), ("a.txt", text)])
    assert source[0].caption == "json"
    again = ShardSource(str(tmp_path / "*.tar"), size=8)
    assert again[0].caption == "一只白猫坐在红色的椅子上"


def test_a_sample_costs_one_range_of_a_store(tmp_path):
    members = [m for k in range(8) for m in pair(f"{k}", k)]
    local = shards(tmp_path, members)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe(f"/one_range/{path.name}", path.read_bytes())
    source = ShardSource("memory://one_range/*.tar", size=8, captions={"caption": 1.0})
    ranges = []
    real = reading._read_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_read_bytes", lambda u, o, s, *p: (ranges.append(s), real(u, o, s, *p))[1])
        assert texts(source) == texts(local)
    assert len(ranges) <= 2 * 8
    used = sum(p[1] + p[3] for p in source.shards[0].index.places.tolist())
    assert max(ranges) < 2 * used / 8 + 2048


def test_one_range_exactly():
    fsspec.filesystem("memory").pipe("/exact/x", bytes(range(100)))
    assert read_range("memory://exact/x", 10, 5) == bytes(range(10, 15))
    assert read_range("memory://exact/x", 10, 0) == b""


WORKERS = """
import multiprocessing, sys
from bdm.data.batch import stream
from bdm.data.shards import ShardSource
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    source = ShardSource(sys.argv[2], size=8, captions={"caption": 1.0})
    print([b.indices for b in stream(source, 0, 4, 4, 0, workers=int(sys.argv[3]))])
"""


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_any_start_method_read_the_same(tmp_path, method):
    shards(tmp_path, [m for k in range(8) for m in pair(f"{k}", k)])
    (tmp_path / "run.py").write_text(WORKERS)
    said = [
        subprocess.run(
            [sys.executable, str(tmp_path / "run.py"), method, str(tmp_path / "*.tar"), workers],
            capture_output=True, text=True, check=True,
        ).stdout
        for workers in "01"
    ]  # fmt: skip
    assert said[0] == said[1] != ""
