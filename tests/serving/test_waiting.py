"""Whose turn it is: in order, together where it helps, and nobody for ever."""

import bdm
from bdm.serving.job import Job
from bdm.serving.waiting import Queue


def job(kind):
    return Job(bdm.Request(prompt=kind))


def fits(kind):
    return lambda job: job.request.prompt == kind


def test_in_order_and_past_those_that_do_not_fit():
    queue, jobs = Queue(patience=9), [job(kind) for kind in "abab"]
    for one in jobs:
        queue.add(one)
    assert [queue.take(fits("a")) for _ in range(3)] == [jobs[0], jobs[2], None]
    assert [queue.take(fits("b")) for _ in range(2)] == [jobs[1], jobs[3]]
    assert not queue


def test_a_stream_of_one_kind_starves_no_other():
    queue, other = Queue(patience=4), job("b")
    queue.add(other)
    taken = 0
    for _ in range(50):
        queue.add(job("a"))
        taken += queue.take(fits("a")) is not None
    assert taken == 4
    assert queue.take(lambda _: True) is other


def test_what_was_cancelled_waits_no_more():
    queue, jobs = Queue(patience=1), [job("b"), job("a")]
    for one in jobs:
        queue.add(one)
    jobs[0].cancel()
    assert len(queue) == 1
    assert queue.take(fits("a")) is jobs[1]
