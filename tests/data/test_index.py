"""One index a corpus: what it decides, how it is made again, and what is read through it."""

import io
import json
import pickle
import tarfile
import threading
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from bdm.cli import main
from bdm.config import IndexConfig
from bdm.data import reading
from bdm.data.batch import fixed_batch, stream
from bdm.data.index import read_index
from bdm.data.index_report import describe, histograms, left_out
from bdm.data.indexed import IndexedSource
from bdm.data.indexing import Corpus, Maker
from bdm.data.node import Node
from bdm.data.pictures import PictureRules
from bdm.data.shards import ShardSource
from bdm.errors import UserError
from bdm.prepare.corpus import index_corpora
from bdm.training.changes import corpus_change, refuse
from bdm.training.recipes.build import build_corpus, build_source


def png(red, size=(24, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "png")
    return file.getvalue()


def write_tar(path, samples):
    """Samples of (key, picture, facts)."""
    with tarfile.open(path, "w") as tar:
        for key, picture, facts in samples:
            for name, content in ((f"{key}.png", picture), (f"{key}.json", json.dumps(facts).encode())):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))


def write_corpus(folder, shards=6, rows=8, change=None):
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        samples = [
            (f"{row:04d}", png(10 * shard + row, (24 + row, 16)), {"caption": f"{shard}/{row}", "score": row})
            for row in range(rows)
        ]
        write_tar(folder / f"{shard:05d}.tar", change(shard, samples) if change else samples)
    return f"{folder}/*.tar"


def config(urls, index, **options):
    data = {"kind": "shards", "urls": urls, "index": str(index), "captions": {"caption": 1.0}, "size": 8}
    return IndexConfig.model_validate({"data": data | options})


def made(urls, index, **options):
    """The source of a new index, and what is said of it."""
    data = config(urls, index, **options).data
    maker = Maker(build_corpus(data), index)
    maker.begin()
    for task in maker.tasks():
        maker.run(task)
    said = describe(*maker.finish())
    return build_source(data), said


def test_an_indexed_corpus_gives_what_the_shards_hold(tmp_path):
    urls = write_corpus(tmp_path / "data")
    source, said = made(urls, tmp_path / "index")
    plain = ShardSource(urls, size=8, captions={"caption": 1.0})
    assert isinstance(source, IndexedSource)
    assert "48 samples in 6 shards" in said
    assert [source.caption(i) for i in range(40)] == [plain.caption(i) for i in range(40)]
    assert all(bool((source[i].pixels == plain[i].pixels).all()) for i in range(40))
    assert [source.validation.caption(i) for i in range(8)] == [f"5/{row}" for row in range(8)]
    index = read_index(tmp_path / "index")
    assert index.samples.dtype.itemsize == 24
    assert (index.samples["width"][:8] == np.arange(24, 32)).all()
    assert fixed_batch(source.validation, 4, 0).captions[0].startswith("5/")


def spoilt(shard, samples):
    if shard == 1:
        samples[2] = ("0002", b"no picture", {"caption": "x"})
        samples[3] = ("0003", png(3), {"other": "x"})
        samples.append(samples[0])
    if shard == 2:
        samples[0] = ("0000", png(1, (900, 16)), {"caption": "wide", "score": 9})
    return samples


def test_filters_damage_and_duplicates_are_decided_and_counted(tmp_path):
    urls = write_corpus(tmp_path / "data", change=spoilt)
    (tmp_path / "data" / "00003.tar").write_bytes(b"")
    source, said = made(urls, tmp_path / "index", min_scores={"score": 2}, max_aspect=4)
    index = read_index(tmp_path / "index")
    assert left_out(index) == {"duplicate": 1, "unreadable": 1, "caption": 1, "score": 9, "size": 1}
    assert len(index) == 40 - 12
    assert "1 of 6 files are not whole" in said
    named = [json.loads(line) for line in (tmp_path / "index/left_out.jsonl").read_text().splitlines()]
    assert named[0]["shard"].endswith("00003.tar")
    assert {n["reason"] for n in named[1:]} == {"unreadable", "caption"}
    total = len(source)
    uses = Counter(i for b in stream(source, 0, total, 2, 0, unreadable_limit=0.0) for i in b.indices)
    assert set(uses) == set(range(total))
    assert set(uses.values()) == {2}, "two passes"
    assert histograms(index)["sides"].sum() == len(index)


def test_work_that_was_stopped_goes_on_and_many_may_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bdm.data.indexing.TOGETHER", 2)
    urls = write_corpus(tmp_path / "data", shards=9)
    checked = config(urls, tmp_path / "index").data
    corpus = build_corpus(checked)
    maker = Maker(corpus, tmp_path / "index")
    maker.begin()
    tasks = maker.tasks()
    assert len(tasks) == 5
    for task in tasks[::-1][:3]:
        maker.run(task)
    with pytest.raises(UserError, match="2 of 5 parts are missing"):
        maker.finish()
    again = Maker(corpus, tmp_path / "index")
    again.begin()
    assert again.tasks() == [0, 1]
    for task in again.tasks():
        again.run(task)
    index, _ = again.finish()
    whole, _ = made(urls, tmp_path / "whole")
    assert index.fingerprint == whole.index.fingerprint
    assert (np.asarray(index.samples) == np.asarray(whole.index.samples)).all()
    assert not (tmp_path / "index" / "making").exists()


def test_a_corpus_that_changed_is_another_and_only_new_shards_are_scanned(tmp_path, monkeypatch):
    urls = write_corpus(tmp_path / "data", shards=6)
    before, _ = made(urls, tmp_path / "index")
    write_tar(tmp_path / "data" / "00006.tar", [("a", png(1), {"caption": "new"})])
    (tmp_path / "data" / "00000.tar").unlink()
    scanned = []
    real = __import__("bdm.data.indexing", fromlist=["x"]).scan_tar_shard
    monkeypatch.setattr(
        "bdm.data.indexing.scan_tar_shard", lambda url, rules: (scanned.append(url), real(url, rules))[1]
    )
    after, said = made(urls, tmp_path / "index")
    assert [url[-9:] for url in scanned] == ["00006.tar"]
    assert "1 shards gone (00000.tar); 1 shards new (00006.tar)" in said
    assert after.changes_since(before.corpus) == ["1 shards gone (00000.tar)", "1 shards new (00006.tar)"]
    assert after.corpus != before.corpus
    run = SimpleNamespace(out="runs/x")
    assert not corpus_change(after.corpus, after.corpus, after, [])
    with pytest.raises(UserError, match=r"other data .*1 shards gone .00000.tar.; 1 shards new"):
        refuse(corpus_change(before.corpus, after.corpus, after, []), run, [])
    with pytest.raises(UserError, match="made anew"):
        pickle.loads(pickle.dumps(before))
    assert pickle.loads(pickle.dumps(after)).caption(0) == "1/0"


def test_a_moved_corpus_is_the_same(tmp_path):
    source, _ = made(write_corpus(tmp_path / "data"), tmp_path / "index")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = build_source(config(f"{tmp_path}/elsewhere/*.tar", tmp_path / "index").data)
    assert moved.corpus == source.corpus
    assert moved.caption(9) == "1/1"


def test_mistakes_are_named(tmp_path):
    urls = write_corpus(tmp_path / "data")
    with pytest.raises(UserError, match="holds no whole index"):
        build_source(config(urls, tmp_path / "index").data)
    made(urls, tmp_path / "index")
    with pytest.raises(UserError, match="other rules .min_side: 0 -> 9"):
        build_source(config(urls, tmp_path / "index", min_side=9).data)
    with pytest.raises(UserError, match="data.urls is"):
        build_source(config(f"{tmp_path}/data/0*.tar", tmp_path / "index").data)
    with pytest.raises(
        UserError, match="0 samples are of use.*48 caption; captions are looked for in nothing"
    ):
        made(urls, tmp_path / "other", captions={"nothing": 1.0})
    with pytest.raises(UserError, match="48 score"):
        made(urls, tmp_path / "other", min_scores={"score": 99})
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(UserError, match="holds no whole index"):
        build_source(config(urls, tmp_path / "index").data)
    with pytest.raises(UserError, match="names no index"):
        list(index_corpora(IndexConfig.model_validate({"data": {"kind": "shards", "urls": urls}})))


def test_an_index_of_another_corpus_gives_no_wrong_sample(tmp_path):
    urls = write_corpus(tmp_path / "data")
    source, _ = made(urls, tmp_path / "index")
    write_tar(tmp_path / "data" / "00001.tar", [(f"x{r}", png(200), {"caption": "wrong"}) for r in range(8)])
    reading._open.cache_clear()
    faults = Counter()
    seen = [c for b in stream(source, 0, 5, 8, 0, faults=faults) for c in b.captions]
    assert "wrong" not in seen
    assert faults["shard"] == 1
    assert len(seen) == 40
    write_corpus(tmp_path / "data", change=lambda s, samples: [(f"y{k}", p, f) for k, p, f in samples])
    reading._open.cache_clear()
    with pytest.raises(UserError, match="data.shard_limit"):
        list(stream(source, 0, 5, 8, 0, unreadable_limit=1.0))


def tall(shard, samples):
    return [(k, png(9, (16, 30)) if n % 2 else p, f) for n, (k, p, f) in enumerate(samples)]


def test_buckets_come_from_the_index(tmp_path):
    urls = write_corpus(tmp_path / "data", shards=10, rows=16, change=tall)
    source, _ = made(urls, tmp_path / "index", size=16, buckets={"step": 4}, partitions=3)
    shapes = [tuple(b.pixels.shape[2:]) for b in stream(source, 0, 12, 4, 0)]
    assert len(set(shapes)) > 1
    whole = [b.indices for b in stream(source, 0, 12, 4, 0)]
    halves = [list(stream(source, 0, 12, 4, 0, process=r, processes=2)) for r in range(2)]
    assert [a.indices + b.indices for a, b in zip(*halves, strict=True)] == whole
    late = [b.indices for b in stream(source, 7, 12, 4, 0, workers=1)]
    assert late == whole[7:]


def test_parquet_is_indexed_by_row_groups(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": png(row), "text": f"图{row}", "score": row % 3} for row in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=6)
    options = {"kind": "parquet", "captions": {"text": 1.0}, "min_scores": {"score": 1}}
    source, said = made(f"{tmp_path}/*.parquet", tmp_path / "index", **options)
    assert "16 samples in 4 shards" in said
    assert [source.caption(i) for i in range(3)] == ["图1", "图2", "图4"]
    assert source[2].pixels[0, 0, 0] == 4
    used = [i for b in stream(source, 0, 6, 2, 0) for i in b.indices]
    assert sorted(used) == list(range(12))


class CountingStore(MemoryFileSystem):
    """A store that counts the bytes it gives, in which every request may fail."""

    protocol = "counted"
    cachable = False
    given: ClassVar = Counter()
    failing: ClassVar = set()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("counted:/"))

    def _open(self, path, mode="rb", **options):
        options.pop("cache_type", None)
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        return _Counted(file, path)


class _Counted:
    def __init__(self, file, path):
        self.file, self.path = file, path

    def read(self, size=-1):
        if CountingStore.failing & {self.path, "*"}:
            CountingStore.failing.discard("*")
            raise OSError("503 Slow Down")
        content = self.file.read(size)
        CountingStore.given[self.path] += len(content)
        return content

    def seek(self, *place):
        self.file.seek(*place)
        return self.file.tell()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A corpus in a counting store, with its index: 33 shards of 12 samples, the last for validation."""
    monkeypatch.setattr(reading.time, "sleep", lambda _: None)
    fsspec.register_implementation("counted", CountingStore, clobber=True)
    CountingStore.failing.clear()
    write_corpus(tmp_path / "data", shards=33, rows=12)
    filesystem = CountingStore()
    filesystem.store.clear()
    for path in (tmp_path / "data").glob("*.tar"):
        filesystem.pipe(f"/corpus/{path.name}", path.read_bytes())
    made("counted://corpus/*.tar", tmp_path / "index")
    CountingStore.given.clear()
    return filesystem


def one_pass(tmp_path, local, **options):
    """What two machines of two processes each read in a pass, and the captions of each of its batches."""
    batches: list[list[str]] = [[] for _ in range(16)]
    for process in range(4):
        node = Node(process // 2 * 2, 2, 4)
        own = {"local": str(tmp_path / f"node{process // 2}"), "local_gb": 1} if local else {}
        source = build_source(
            config("counted://corpus/*.tar", tmp_path / "index", partitions=8, **own, **options).data
        )
        part = stream(source, 0, 16, 24, 0, process=process, processes=4, node=node, read_limit=1.0)
        for number, batch in enumerate(part):
            batches[number] += batch.captions
    return batches


def test_a_machine_fetches_each_of_its_shards_once(store, tmp_path):
    size = sum(len(store.cat_file(f"/corpus/{k:05d}.tar")) for k in range(32))
    CountingStore.given.clear()
    local = one_pass(tmp_path, local=True)
    assert sorted(c for b in local for c in b) == sorted(f"{s}/{r}" for s in range(32) for r in range(12))
    assert CountingStore.given.total() <= 1.15 * size
    CountingStore.given.clear()
    assert one_pass(tmp_path, local=True) == local
    assert CountingStore.given.total() == 0, "the next pass finds them"


def test_without_a_disk_a_sample_is_one_range(store, tmp_path):
    size = sum(len(store.cat_file(f"/corpus/{k:05d}.tar")) for k in range(32))
    CountingStore.given.clear()
    far = one_pass(tmp_path, local=False)
    assert CountingStore.given.total() <= size
    assert one_pass(tmp_path, local=True) == far


@pytest.mark.parametrize("fault", ["once", "one shard", "full disk", "changed"])
def test_whatever_happens_to_a_shard_the_run_goes_on(store, tmp_path, fault, monkeypatch):
    right = one_pass(tmp_path, local=False)
    if fault == "once":
        CountingStore.failing.add("*")
    elif fault == "one shard":
        CountingStore.failing.add("/corpus/00003.tar")
    elif fault == "full disk":
        (tmp_path / "node0").write_text("no folder")
        (tmp_path / "node1").mkdir(mode=0o500)
        monkeypatch.setattr(
            reading, "copy_file", lambda *_: (_ for _ in ()).throw(reading.Refused("No space left"))
        )
    else:
        content = store.cat_file("/corpus/00003.tar")
        store.pipe("/corpus/00003.tar", content[:512].replace(b"0000", b"9999") + content[512:])
        reading._open.cache_clear()  # files of memory stay what they were where they are open
    seen = one_pass(tmp_path, local=True)
    if fault in ("once", "full disk"):
        assert seen == right
        return
    lost = {c for b in right for c in b} - {c for b in seen for c in b}
    assert lost == ({"3/0"} if fault == "changed" else {f"3/{row}" for row in range(12)})
    assert sum(map(len, seen)) == 384


def test_a_small_folder_is_kept_in_bounds(store, tmp_path):
    size = len(store.cat_file("/corpus/00000.tar"))
    one_pass(tmp_path, local=True)
    few = {"local": str(tmp_path / "few"), "local_gb": 3e-9 * size}
    source = build_source(config("counted://corpus/*.tar", tmp_path / "index", **few).data)
    assert len([b for b in stream(source, 0, 16, 24, 0)]) == 16
    # Shards that were on their way when the last batch came still make room for themselves.
    for thread in threading.enumerate():
        if thread.name.startswith("bdm-fetch"):
            thread.join(timeout=60)
    kept = [path.stat().st_size for path in (tmp_path / "few").glob("*.kept")]
    assert 0 < sum(kept) <= 4 * size


def test_the_command_makes_every_index_that_is_named(tmp_path, capsys):
    urls = write_corpus(tmp_path / "data")
    text = json.dumps(json.loads(config(urls, tmp_path / "index").model_dump_json()))
    (tmp_path / "config.yaml").write_text(text[:-1] + ', "recipe": {"kind": "branch"}}')
    assert main(["index", str(tmp_path / "config.yaml"), "data.size=16"]) == 0
    assert "48 samples in 6 shards" in capsys.readouterr().out
    assert (tmp_path / "index/histogram.png").stat().st_size > 1000


def test_described_and_compared_corpora(tmp_path):
    corpus = Corpus(kind="shards", urls=("a",), rules=PictureRules(min_side=3))
    assert corpus.decisive["min_side"] == 3
    source, _ = made(write_corpus(tmp_path / "data"), tmp_path / "index")
    assert "changed since" not in describe(source.index, [])
    assert source.changes_since("unknown") == []
