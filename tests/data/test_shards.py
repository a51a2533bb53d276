"""Tar shards: every sample once a pass, in an order of its own, and damaged ones without harm."""

import io
import json
import pickle
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from bdm.data.batch import _collate, _Positions, stream
from bdm.data.order import WINDOW, draw_indices
from bdm.data.shards import ShardSource, expand_urls
from bdm.data.source import UnreadableExample
from bdm.data.tar import index_shard
from bdm.errors import UserError


def png(colour, size=(24, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def write_shards(folder, sizes, change=None):
    """Shards as img2dataset writes them; ``change`` edits a sample by (shard, row)."""
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for row in range(size):
                facts = {"caption": f"long {shard}/{row}", "score": row / size, "width": 24, "height": 16}
                sample = {
                    "__key__": f"{shard:05d}{row:04d}",
                    "png": png((shard * 10, row * 10, 7)),
                    "txt": f"{shard}/{row}",
                    "json": json.dumps(facts).encode(),
                }
                writer.write(change(shard, row, sample) if change else sample)
    return str(folder / f"{{00000..{len(sizes) - 1:05d}}}.tar")


def test_samples_are_what_was_written(tmp_path):
    source = ShardSource(write_shards(tmp_path, [3, 5, 2]), size=8)
    assert (len(source), len(source.validation)) == (8, 2)
    assert [source.caption(i) for i in range(8)] == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2", "1/3", "1/4"]
    assert source[4].pixels.shape == (3, 8, 8)
    assert source[4].pixels[:, 0, 0].tolist() == [10, 10, 7]
    assert source.validation[1].pixels[:, 0, 0].tolist() == [20, 10, 7]
    assert source.key(4).endswith("00001.tar:000010001")
    again = ShardSource(str(tmp_path / "*.tar"), size=8)
    assert [again.caption(i) for i in range(8)] == [source.caption(i) for i in range(8)]


def test_index_is_kept_and_made_anew_for_a_changed_file(tmp_path):
    write_shards(tmp_path, [3])
    url = str(tmp_path / "00000.tar")
    first = index_shard(url, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    stamp = kept.stat().st_mtime_ns
    again = index_shard(url, tmp_path / "kept")
    assert kept.stat().st_mtime_ns == stamp
    assert (again.keys, again.places.tolist()) == (first.keys, first.places.tolist())
    write_shards(tmp_path, [4])
    assert len(index_shard(url, tmp_path / "kept")) == 4


@pytest.mark.parametrize("sizes", [[7], [3, 5, 2, 8], [3, 5, 2, 8] * 12, [4] * 40])
def test_every_pass_is_a_permutation_that_keeps_windows_together(sizes):
    total = sum(sizes)
    passes = [draw_indices(epoch * total, total, sizes, seed=5) for epoch in range(3)]
    assert all(sorted(order) == list(range(total)) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [draw_indices(p, 1, sizes, 5)[0] for p in range(2 * total)] == passes[0] + passes[1]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    left, opened, most = dict(enumerate(sizes)), set(), 0
    for shard in shard_of[passes[0]].tolist():
        left[shard] -= 1
        opened = (opened | {shard}) if left[shard] else (opened - {shard})
        most = max(most, len(opened))
    # Of so many shards at most some samples were read and others not; less than half of a window would hardly
    # mix.
    assert min(len(sizes), WINDOW) / 2 <= most <= min(len(sizes), WINDOW)


def test_order_and_captions_do_not_depend_on_processes_or_workers(tmp_path):
    source = ShardSource(write_shards(tmp_path, [3, 5, 6, 2]), size=8, captions={"caption": 1.0, "txt": 3.0})
    whole = [(b.indices, b.captions) for b in stream(source, 0, 6, 4, seed=2)]
    late = [(b.indices, b.captions) for b in stream(source, 3, 6, 4, seed=2, workers=2)]
    assert late == whole[3:]
    halves = [list(stream(source, 0, 6, 4, seed=2, process=r, processes=2)) for r in range(2)]
    assert [(a.indices + b.indices, a.captions + b.captions) for a, b in zip(*halves, strict=True)] == whole


def test_captions_are_drawn_by_weight(tmp_path):
    source = ShardSource(write_shards(tmp_path, [8, 8, 1]), size=8, captions={"caption": 1.0, "txt": 3.0})
    drawn = [c for b in stream(source, 0, 50, 16, seed=0) for c in b.captions]
    share = sum(c.startswith("long") for c in drawn) / len(drawn)
    assert 0.2 < share < 0.3
    assert source.caption(0) == "0/0"


def damaged(shard, row, sample):
    if shard == 0 and row == 1:
        sample["png"] = sample["png"][:40]
    if shard == 0 and row == 2:
        del sample["txt"]
    if shard == 1 and row == 0:
        sample["png"] = png((0, 0, 0), (4, 4))
    return sample


def test_unusable_examples_give_way_and_are_named(tmp_path):
    source = ShardSource(
        write_shards(tmp_path, [10, 10, 1], damaged), size=8, min_side=8, min_scores={"score": 0.05}
    )
    bad = {1, 2, 0, 10}  # truncated, no text, score 0, too small (and score 0)
    for index in bad:
        with pytest.raises(UnreadableExample):
            source[index]
    log = tmp_path / "unreadable.jsonl"
    one = [b.indices for b in stream(source, 0, 10, 4, seed=1, log=log, unreadable_limit=1.0)]
    assert not bad & {i for indices in one for i in indices}
    reasons = {
        json.loads(line)["key"].rpartition(":")[2]: json.loads(line)["reason"]
        for line in log.read_text().splitlines()
    }
    # What a filter leaves out is no fault, and has no place in the order.
    assert set(reasons) == {"000000001", "000000002"}
    assert "no caption in txt; it has caption" in reasons["000000002"]
    split = [
        list(stream(source, 0, 10, 4, seed=1, process=r, processes=2, workers=1, unreadable_limit=1.0))
        for r in range(2)
    ]
    assert [a.indices + b.indices for a, b in zip(*split, strict=True)] == one


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unusable_examples_end_the_run(tmp_path, workers):
    source = ShardSource(write_shards(tmp_path, [10, 1]), size=8, captions={"no_such_field": 1.0})
    with pytest.raises(UserError, match=r"no caption in no_such_field.*unreadable_limit") as error:
        list(stream(source, 0, 100, 4, seed=1, workers=workers))
    assert "\n" not in str(error.value)


def test_half_a_character_costs_its_sample_alone(tmp_path):
    """An emoji that was cut in two, which JSON can hold and UTF-8 cannot, in a caption or in what is
    logged."""

    def cut(shard, row, sample):
        facts = {"caption": "\ud83d" if row == 1 else "灯笼\U0001f600", f"\ud83d{row}": 1}
        if row == 2:
            del facts["caption"]
        return sample | {"json": json.dumps(facts).encode()}

    captions = {"caption": 1.0}
    source = ShardSource(write_shards(tmp_path, [4, 1], cut), size=8, captions=captions)
    assert source[0].caption == "灯笼\U0001f600"
    with pytest.raises(UnreadableExample, match="half of a character"):
        source[1]
    log = tmp_path / "unreadable.jsonl"
    used = [i for b in stream(source, 0, 4, 2, seed=1, log=log, unreadable_limit=1.0) for i in b.indices]
    assert set(used) == {0, 3}
    reasons = {json.loads(line)["reason"] for line in log.read_bytes().split(b"\n") if line}
    assert reasons == {
        "its caption holds half of a character",
        "no caption in caption; it has txt, \ud83d2",
    }
    both = ShardSource(str(tmp_path / "*.tar"), size=8, captions={"caption": 1.0, "txt": 1.0})
    assert both[1].captions == ("0/1",), "another caption is taken"


def test_filters_may_leave_out_many(tmp_path):
    """Only damage, and captions that are not there, count as mistakes."""
    source = ShardSource(write_shards(tmp_path, [40, 1]), size=8, min_scores={"score": 0.9})
    used = {i for b in stream(source, 0, 30, 4, seed=1, unreadable_limit=0.0) for i in b.indices}
    assert used == {36, 37, 38, 39}


def test_what_data_workers_are_given_can_be_sent_to_a_new_process(tmp_path):
    """As where they are not forked: macOS, Windows, and Python 3.14."""
    source = ShardSource(write_shards(tmp_path, [4, 1]), size=8)
    given = (_Positions(source), partial(_collate, 1))
    positions, collate = pickle.loads(pickle.dumps(given))
    batch, _, _ = collate([positions[0, 2], positions[1, 3]])
    assert batch.captions == ["0/2", "0/3"]


def test_a_run_without_a_usable_example_ends_whatever_the_limit(tmp_path):
    source = ShardSource(write_shards(tmp_path, [5, 1]), size=8, captions={"no_such_field": 1.0})
    with pytest.raises(UserError, match=r"5 of 5 examples cannot be used, .*no caption in no_such_field"):
        next(stream(source, 0, 1, 4, seed=1, unreadable_limit=1.0))


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "png")

    def bomb(shard, row, sample):
        return sample | {"png": file.getvalue()}

    source = ShardSource(write_shards(tmp_path, [1, 1], bomb), size=8)
    with pytest.raises(UnreadableExample, match="pixels"):
        source[0]


def test_bad_shards(tmp_path):
    with pytest.raises(UserError, match="matches no shard"):
        expand_urls(str(tmp_path / "*.tar"))
    with pytest.raises(UserError, match="cannot be opened"):
        ShardSource([str(tmp_path / "none.tar")], validation_shards=0)
    write_shards(tmp_path, [6, 1])
    with pytest.raises(UserError, match="kept for validation"):
        ShardSource(str(tmp_path / "00000.tar"))
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match="not a whole tar file"):
        ShardSource(str(tmp_path / "{00000..00001}.tar"))
    with tarfile.open(tmp_path / "00000.tar", "w"):
        pass
    with pytest.raises(UserError, match="no shard holds a picture"):
        ShardSource(str(tmp_path / "{00000..00001}.tar"))


def test_any_file_system_of_fsspec(tmp_path):
    import fsspec

    write_shards(tmp_path, [3, 2])
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    source = ShardSource("memory://shards/*.tar", size=8)
    local = ShardSource(str(tmp_path / "*.tar"), size=8)
    assert torch.equal(source[2].pixels, local[2].pixels)
