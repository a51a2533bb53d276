"""The tables of prepared shards: one mapped array says what the tables of single shards say."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm.data.prepared import PreparedSource
from bdm.data.prepared_table import ROW, read_table
from bdm.errors import UserError
from bdm.prepare import tables
from bdm.prepare.hashing import find_duplicates
from bdm.prepare.report import finish_folder


def write_folder(out, counts=(5, 0, 7), seed=0):
    """Tables of shards whose tars are empty of content but of the right sizes."""
    out.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for split, sizes in (("train", counts), ("validation", (3,))):
        for number, rows in enumerate(sizes):
            path = out / f"{split}-{number:05d}.tar"
            places = [[512 + 2048 * r, 700, 512 + 2048 * r + 1536, 40 + r] for r in range(rows)]
            path.write_bytes(b"x" * (2048 * rows + 100))
            scores = [None if rng.random() < 0.1 else round(float(rng.normal()), 4) for _ in range(rows)]
            table = {
                "left_out": {"size": 2}, "unusable": [["k\ud83d", "bad"]], "size": path.stat().st_size,
                "seen_scores": [s for s in scores if s is not None], "scores": scores, "places": places,
                "buckets": rng.integers(0, 3, rows).tolist(), "hashes": rng.integers(0, 6, rows).tolist(),
            }  # fmt: skip
            path.with_suffix(".json").write_text(json.dumps(table))
            paths.append(path)
    manifest = {"format": 1, "models": {}, "scorer": "s", "buckets": [[8, 8]] * 3}
    (out / "prepared.json").write_text(json.dumps(manifest))
    return paths


def content(source):
    shards = [source._shards[k] for k in range(len(source.shard_sizes))]
    return [(s.url, s.places.tolist(), s.buckets.tolist()) for s in shards], source.bucket_of.tolist()


@pytest.mark.parametrize("options", [{}, {"duplicates": True}, {"min_score": 0.2}])
def test_the_table_says_what_the_shards_say(tmp_path, options):
    report = finish_folder(tmp_path / "out", write_folder(tmp_path / "out"), 15, 15, 1.0, None)
    assert (report["kept"], report["left_out"], report["shards"]) == (15, {"size": 8}, 4)
    mapped = PreparedSource(str(tmp_path / "out"), **options)
    assert isinstance(mapped._shards._table.rows, np.memmap)
    assert ROW.itemsize == 24
    again = pickle.loads(pickle.dumps(mapped))
    for name in ("train.rows", "validation.rows"):
        (tmp_path / "out" / name).unlink()
    listed = PreparedSource(str(tmp_path / "out"), **options)
    assert content(listed) == content(mapped) == content(again)
    assert listed.shard_sizes == mapped.shard_sizes
    assert len((tmp_path / "out/unusable.jsonl").read_bytes().splitlines()) == 4


def test_a_shard_that_changed_is_named(tmp_path):
    paths = write_folder(tmp_path)
    finish_folder(tmp_path, paths, 15, 15, 1.0, None)
    paths[2].write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-00002.tar has 5 bytes, its table says"):
        PreparedSource(str(tmp_path))


def test_a_table_that_is_not_whole_is_not_used(tmp_path):
    finish_folder(tmp_path, write_folder(tmp_path), 15, 15, 1.0, None)
    whole = (tmp_path / "train.rows").read_bytes()
    (tmp_path / "train.rows").write_bytes(whole[: -ROW.itemsize])
    assert read_table(str(tmp_path), "train") is None
    assert PreparedSource(str(tmp_path), duplicates=True).shard_sizes == [5, 0, 7]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=5), st.integers(1, 20))
def test_near_duplicates_are_found_part_by_part(hashes, together):
    flat = np.array([h for shard in hashes for h in shard], dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TOGETHER", together)
        later = tables.mark_later(flat)
    parts = np.split(later, np.cumsum([len(shard) for shard in hashes])[:-1])
    assert [np.flatnonzero(part).tolist() for part in parts] == find_duplicates(hashes)


def test_scores_are_counted():
    totals = tables.Totals()
    totals.add({"left_out": {}, "seen_scores": [0.5, 0.5, 0.1], "places": [], "size": 3})
    assert totals.scores == Counter({0.5: 2, 0.1: 1})
