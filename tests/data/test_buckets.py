"""Aspect-ratio buckets.

Batches of one shape, passes without repetitions, in an order that the seed alone decides.
"""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from bdm.data.batch import fixed_batch, make_batch, stream
from bdm.data.buckets import BucketOrder, bucket_sizes, nearest_bucket
from bdm.data.folder import FolderSource
from bdm.data.shards import ShardSource
from bdm.data.source import Example
from bdm.errors import UserError


def test_sizes_are_stable_diffusions():
    sizes = bucket_sizes(512)
    assert sizes == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384)), sizes
    wide = bucket_sizes(768, 64, 3.0)
    assert all(w % 64 == h % 64 == 0 and w * h <= 768 * 768 and max(w, h) <= 3 * min(w, h) for w, h in wide)
    assert {(h, w) for w, h in wide} == set(wide)
    with pytest.raises(UserError, match=r"size 500 is no multiple of step 64.*448"):
        bucket_sizes(500)


def test_the_nearest_bucket_is_by_aspect():
    sizes = bucket_sizes(512)
    pictures = np.array([[2000, 2000], [640, 384], [100, 60], [384, 640], [30, 900], [0, 0], [577, 448]])
    assert nearest_bucket(pictures, sizes).tolist() == [2, 4, 4, 0, 0, 2, 3]
    for size in bucket_sizes(64, 8):
        (found,) = nearest_bucket(np.array([size]) * 7, bucket_sizes(64, 8))
        w, h = bucket_sizes(64, 8)[found]
        assert w * size[1] == h * size[0]


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_pass_repeats_nothing_and_leaves_out_only_what_fills_no_batch(batch):
    sizes = [11, 3, 20, 9] * 12
    buckets = np.random.default_rng(0).choice(3, sum(sizes), p=[0.7, 0.25, 0.05]).astype(np.int16)
    order = BucketOrder(buckets, sizes, batch, seed=3)
    passes = [
        [order.indices(epoch * order.per_pass + i) for i in range(order.per_pass)] for epoch in range(2)
    ]
    for batches in passes:
        assert all(len(indices) == batch and len(set(buckets[indices])) == 1 for indices in batches)
        used = Counter(i for indices in batches for i in indices)
        assert max(used.values()) == 1
        counts = Counter(buckets[list(used)].tolist())
        assert counts == {b: c // batch * batch for b, c in Counter(buckets.tolist()).items() if c >= batch}
        assert len(buckets) - len(used) == order.left_out
    assert passes[0] != passes[1]
    again = BucketOrder(
        buckets, sizes, batch, seed=3
    )  # asked backwards, as a resume may ask for any number first
    numbers = range(2 * order.per_pass - 1, -1, -1)
    assert [again.indices(i) for i in numbers] == (passes[0] + passes[1])[::-1]


def test_too_few_for_a_batch():
    with pytest.raises(UserError, match="no bucket has 4 samples"):
        BucketOrder(np.array([0, 0, 0, 1, 1]), [5], 4, 0)


SHAPES = [(40, 40), (80, 44), (44, 80), (40, 41)]


@pytest.fixture
def shards(tmp_path):
    for shard in range(4):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as tar:
            for row in range(9):
                file = io.BytesIO()
                Image.new("RGB", SHAPES[(row + shard) % 4], (10 * shard, 10 * row, 0)).save(file, "png")
                png = b"damaged" if (shard, row) == (1, 3) else file.getvalue()
                tar.write({"__key__": f"{shard}-{row}", "png": png, "txt": f"{shard}/{row}"})
    return str(tmp_path / "*.tar")


def test_batches_of_shards_have_one_shape_whoever_reads_them(shards):
    source = ShardSource(shards, size=32, buckets=bucket_sizes(32, 8))
    kept = ShardSource(shards, size=32, buckets=bucket_sizes(32, 8))  # sizes come from the index now
    assert kept.bucket_of.tolist() == source.bucket_of.tolist()
    whole = list(stream(source, 0, 12, 4, seed=1, unreadable_limit=1.0))
    assert len({tuple(b.pixels.shape[2:]) for b in whole}) == 3
    assert all(b.pixels.shape[2] * b.pixels.shape[3] <= 32 * 32 for b in whole)
    late = list(stream(kept, 7, 12, 4, seed=1, unreadable_limit=1.0, workers=1))
    assert [b.indices for b in late] == [b.indices for b in whole[7:]]
    halves = [
        list(stream(source, 0, 12, 4, seed=1, process=r, processes=2, unreadable_limit=1.0)) for r in range(2)
    ]
    assert [a.indices + b.indices for a, b in zip(*halves, strict=True)] == [b.indices for b in whole]
    assert all(
        torch.equal(torch.cat([a.pixels, b.pixels]), w.pixels) for a, b, w in zip(*halves, whole, strict=True)
    )
    assert len(fixed_batch(source, 64, 0)) >= 12


def test_folders_have_buckets_too(tmp_path):
    rows = []
    for i, shape in enumerate(SHAPES * 3):
        Image.new("RGB", shape).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": str(i)}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    source = FolderSource(tmp_path, size=32, validation=1, buckets=bucket_sizes(32, 8))
    assert {tuple(source[i].pixels.shape[1:]) for i in range(len(source))} == {(32, 32), (24, 40), (40, 24)}


def test_flips_are_the_samples_own():
    pixels = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    samples = [(i, i, Example("", pixels, flip=0.5)) for i in range(200)]
    batch = make_batch(samples, seed=0)
    mirrored = [torch.equal(p, pixels.flip(-1)) for p in batch.pixels]
    assert 70 < sum(mirrored) < 130
    late = make_batch(samples[50:60], seed=0)
    assert torch.equal(late.pixels, batch.pixels[50:60])
    plain = make_batch([(i, i, Example("", pixels)) for i in range(20)], seed=0)
    assert all(torch.equal(p, pixels) for p in plain.pixels)
