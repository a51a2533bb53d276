"""The order of large corpora: every sample once a pass, whoever reads it and however often it is stopped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm.data.bucket_partitions import BucketPartitionOrder, taken_of
from bdm.data.node import Node
from bdm.data.partitions import WINDOW, PartitionOrder, Partitions, own_share

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**40), partitions=st.integers(1, 80), epoch=st.integers(0, 3))
def test_every_sample_comes_once_a_pass(sizes, seed, partitions, epoch):
    order = PartitionOrder(Partitions(np.array(sizes), seed, partitions), 1)
    total = sum(sizes)
    positions = np.arange(epoch * total, (epoch + 1) * total)
    assert sorted(order.indices(positions).tolist()) == list(range(total))


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    seed=st.integers(0, 99),
    partitions=st.integers(1, 20),
    share=st.integers(1, 5),
    processes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    number=st.integers(0, 50),
)
def test_a_batch_is_the_same_for_any_number_of_processes(sizes, seed, partitions, share, processes, number):
    size = share * 12
    corpus = Partitions(np.array(sizes), seed, partitions)
    order = PartitionOrder(corpus, size)
    whole = order.share(number, 0, 1)
    assert [p for r in range(processes) for p in order.share(number, r, processes)] == whole
    assert sorted(p for p, _ in whole) == list(range(number * size, (number + 1) * size))
    # A resumed run and one of other batches see the same sample at the same position.
    fresh = PartitionOrder(Partitions(np.array(sizes), seed, partitions), size)
    assert fresh.share(number, 0, 1) == whole
    assert dict(whole) == {
        p: i for n in range(12 * number, 12 * number + 12)
        for p, i in PartitionOrder(corpus, share).share(n, 0, 1)
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=25),
    seed=st.integers(0, 99),
    partitions=st.integers(1, 12),
    size=st.sampled_from([1, 4, 6]),
    epoch=st.integers(0, 2),
)
def test_buckets_keep_their_promises(sizes, seed, partitions, size, epoch):
    total = sum(sizes)
    buckets = np.random.default_rng(seed).choice(3, total, p=[0.7, 0.25, 0.05]).astype(np.int16)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counts = np.stack(
        [np.bincount(buckets[a:b], minlength=3) for a, b in zip(starts, starts[1:], strict=False)]
    )
    if not (counts.sum(0) >= size).any():
        return
    order = BucketPartitionOrder(Partitions(np.array(sizes), seed, partitions), buckets, counts, size)
    used = []
    for number in range(epoch * order.per_pass, (epoch + 1) * order.per_pass):
        whole = order.share(number, 0, 1)
        if size % 2 == 0:
            assert order.share(number, 0, 2) + order.share(number, 1, 2) == whole
        assert len({int(buckets[i]) for _, i in whole}) == 1
        used += [i for _, i in whole]
    assert len(set(used)) == len(used) == total - order.left_out
    assert order.left_out == int((counts.sum(0) % size).sum())


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any))
def test_partitions_are_used_up_evenly(counts):
    counts = np.array(counts)
    total = int(counts.sum())
    taken = np.array([taken_of(counts, first) for first in range(total + 1)])
    assert (taken.sum(1) == np.arange(total + 1)).all()
    assert (np.diff(taken, axis=0) >= 0).all()
    assert (abs(taken - np.arange(total + 1)[:, None] * counts / total) <= 1 + len(counts) / 2).all()


@pytest.mark.parametrize(("processes", "per_node"), [(4, 2), (8, 4), (6, 2), (12, 4)])
def test_a_machine_reads_the_shards_of_its_own_partitions(processes, per_node):
    sizes = np.full(96, 50)
    order = PartitionOrder(Partitions(sizes, 3, 12), 96)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    read = []
    for first in range(0, processes, per_node):
        node = Node(first, per_node, processes)
        owned = order.partitions.segments
        mine = {s for p in node.owned(12) for s in owned.shard[owned.cuts[p] : owned.cuts[p + 1]].tolist()}
        seen = {
            int(shard_of[i])
            for n in range(sizes.sum() // 96) for r in range(first, first + per_node)
            for _, i in order.share(n, r, processes)
        }  # fmt: skip
        assert seen == mine
        read.append(mine)
    assert sum(map(len, read)) == len(set.union(*read)) == 96


def test_a_batch_takes_its_share_of_every_partition():
    order = PartitionOrder(Partitions(np.full(64, 30), 0, 8), 32)
    shares = np.bincount((order.where(np.arange(32)) * 8).astype(int), minlength=8)
    assert shares.tolist() == [4] * 8
    assert own_share(order.where(np.arange(32)), 1, 4).tolist() == [2, 10, 18, 26, 3, 11, 19, 27]


def test_few_shards_are_open_at_a_time():
    sizes, partitions = np.full(120, 20), 6
    order = PartitionOrder(Partitions(sizes, 1, partitions), 1)
    shard_of = np.repeat(np.arange(120), sizes)[order.indices(np.arange(2400))]
    left = dict(enumerate(sizes.tolist()))
    opened, most = set(), 0
    for shard in shard_of.tolist():
        left[shard] -= 1
        opened = opened | {shard} if left[shard] else opened - {shard}
        most = max(most, len(opened))
    assert partitions * WINDOW / 2 < most <= partitions * WINDOW * 1.5
    again = order.indices(np.arange(2400, 4800))
    assert again.tolist() != order.indices(np.arange(2400)).tolist()


def test_windows_are_found_again_at_any_batch():
    order = PartitionOrder(Partitions(np.array([13, 0, 7, 40, 21] * 5), 2, 3), 16)
    total, count = order.partitions.total, order.partitions.count
    for number in range(40):
        for partition in range(count):
            first = next(q for q in range(number * 16, 10**6) if q % total % count == partition)
            expected = (
                first // total,
                order.partitions.window_at(first // total, partition, first % total // count),
            )
            assert order.windows_from(number, partition) == expected


def test_machines_are_those_that_launchers_tell_of(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Node.of(6, 8) == Node(4, 4, 8)
    assert Node.of(0, 6) == Node(0, 1, 6), "a number that cannot be is not believed"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Node.of(3, 8) == Node(3, 1, 8)
