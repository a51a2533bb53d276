"""Several corpora as one: weights are kept, passes are whole, and the order is a pure function."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdm.config import MixConfig, RunConfig
from bdm.data.batch import fixed_batch, stream
from bdm.data.mixing import MixedSource, Pattern
from bdm.data.partitions import PartitionOrder, Partitions
from bdm.data.source import Example
from bdm.errors import UserError
from bdm.training.changes import meaning
from bdm.training.recipes.build import build_source


class Plain:
    def __init__(self, name, count, shard_sizes=None, partitions=0):
        self.name, self.count, self.shard_sizes = name, count, shard_sizes or [count]
        if partitions:
            self.make_order = lambda size, seed: PartitionOrder(
                Partitions(np.array(self.shard_sizes), seed, partitions), size
            )

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Example(f"{self.name}{index}", captions=(f"{self.name}{index}",), caption_weights=(1.0,))

    @property
    def validation(self):
        return Plain("v" + self.name, 4)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), start=st.integers(0, 10**9))
def test_a_pattern_keeps_weights_and_counts_each_corpus_through(weights, start):
    pattern = Pattern(weights)
    corpus, own = pattern(np.arange(start, start + 3000))
    for k, weight in enumerate(weights):
        ranks = own[corpus == k]
        assert (np.diff(ranks) == 1).all()
        assert abs(len(ranks) - 3000 * weight / sum(weights)) <= 3 * len(weights) + 3
    first = pattern(np.array([0]))[1]
    assert first[0] == 0


@settings(max_examples=20, deadline=None)
@given(
    processes=st.sampled_from([1, 2, 4]),
    resumed=st.integers(0, 30),
    seed=st.integers(0, 50),
    partitions=st.integers(0, 5),
)
def test_each_corpus_goes_through_its_own_passes(processes, resumed, seed, partitions):
    mixed = MixedSource([Plain("a", 60, [20, 10, 30], partitions), Plain("b", 20, [5, 15])], [3.0, 1.0])
    share = mixed.order(8, seed)
    whole = [share(number, 0, 1) for number in range(60)]
    again = mixed.order(8, seed)
    assert [p for r in range(processes) for p in again(resumed, r, processes)] == whole[resumed]
    drawn = dict(pair for batch in whole for pair in batch)
    for low, high, times in ((0, 60, 6), (60, 80, 6)):
        own = [drawn[p] for p in range(480) if low <= drawn[p] < high]
        assert len(own) == times * (high - low)
        size = high - low
        assert all(sorted(own[i : i + size]) == list(range(low, high)) for i in range(0, len(own), size))


def test_mixed_samples_are_their_sources(tmp_path):
    mixed = MixedSource([Plain("a", 6), Plain("b", 4)], [1, 1])
    assert (len(mixed), mixed[7].caption, mixed.key(2)) == (10, "b1", "2")
    seen = Counter(c[0] for b in stream(mixed, 0, 10, 4, 0) for c in b.captions)
    assert seen == {"a": 20, "b": 20}
    assert {c[:2] for c in fixed_batch(mixed.validation, 8, 0).captions} == {"va", "vb"}
    with pytest.raises(UserError, match="weights"):
        MixedSource([Plain("a", 3)], [0])


def write_folder(path, count, shape=(16, 16)):
    path.mkdir()
    rows = []
    for i in range(count):
        Image.new("RGB", shape, (i, 0, 0)).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{path.name}{i}"}))
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return {"kind": "folder", "path": str(path), "size": 16, "validation": 2}


def run_config(parts, **rest):
    return RunConfig.model_validate({
        "out": "o", "recipe": {"kind": "autoencoder", "model": {}}, "data": {"kind": "mix", "parts": parts},
        "optimizer": {"steps": 200, "batch_size": 4, "learning_rate": 1},
    } | rest)  # fmt: skip


def test_a_configuration_mixes(tmp_path):
    parts = [
        {"weight": 3, "data": write_folder(tmp_path / "a", 12)},
        {"data": write_folder(tmp_path / "b", 8)},
    ]
    run = run_config(parts)
    source = build_source(run.data)
    seen = Counter(c[0] for b in stream(source, 0, 8, 4, 0) for c in b.captions)
    assert seen == {"a": 24, "b": 8}
    moved = [dict(p, data=dict(p["data"], buckets={"step": 4})) for p in parts]
    with pytest.raises(ValueError, match="different size or buckets"):
        run_config([parts[0], moved[1]])
    assert json.loads(meaning(run))["data"]["parts"][0]["weight"] == 3


def test_with_buckets_a_batch_is_of_one_corpus(tmp_path):
    shapes = {"a": (16, 16), "b": (16, 24)}
    parts = [
        {"data": write_folder(tmp_path / name, 14, shape) | {"buckets": {"step": 4}}}
        for name, shape in shapes.items()
    ]
    source = build_source(run_config(parts).data)
    batches = list(stream(source, 0, 12, 4, 0))
    assert {len({c[0] for c in b.captions}) for b in batches} == {1}
    assert Counter(b.captions[0][0] for b in batches) == {"a": 6, "b": 6}
    halves = [list(stream(source, 0, 12, 4, 0, process=r, processes=2)) for r in range(2)]
    assert [x.indices + y.indices for x, y in zip(*halves, strict=True)] == [b.indices for b in batches]
    assert len(fixed_batch(source, 8, 0)) == 8


def test_groups_of_the_emoji_mix_by_their_weights():
    native, shared = ({"kind": "emoji", "size": 16, "groups": [group]} for group in ("native", "shared"))
    parts = [{"weight": 3, "data": native}, {"weight": 1, "data": shared}]
    run = RunConfig(
        out="runs/x",
        recipe={"kind": "branch", "backbone": "b", "native_text_encoder": "t", "cache": True},
        data={"kind": "mix", "parts": parts},
        optimizer={"steps": 1, "batch_size": 40, "learning_rate": 1, "warmup_steps": 0},
    )
    source = build_source(run.data)
    own = source.sources[0]
    drawn = [index for _, index in source.order(40, 0)(0, 0, 1)]
    assert sum(index < len(own) for index in drawn) == 30
    assert source.caption(drawn[0]) in {row.caption for part in source.sources for row in part.rows}
    assert {own.world.concepts[row.concept].group for row in own.rows} == {"native"}


def test_emoji_mix_with_pictures_of_their_size_alone():
    folder = {"kind": "folder", "path": "/data/x", "size": 64, "buckets": {}}
    with pytest.raises(ValueError, match="different size or buckets"):
        MixConfig(kind="mix", parts=[{"data": {"kind": "emoji"}}, {"data": folder}])
