"""Requests enter and leave an engine; none depends on the others."""

import numpy as np
import pytest

import bdm
from bdm.drawing.painter import Painter
from bdm.serving.job import Cancelled, QueueFull


@pytest.fixture
def engine(pipe):
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        yield engine


def pixels(drawn):
    return np.asarray(drawn.image).astype(int)


def test_a_picture_is_the_painters(pipe):
    request = bdm.Request(prompt="龙", steps=3, seed=5)
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        job = engine.submit(request)
        drawn = job.result(60)
    (alone,) = Painter("cpu", given=(job.request.model, "fp32", pipe)).draw([job.request])
    assert abs(pixels(drawn) - pixels(alone)).max() <= 1
    assert (job.status, job.step, job.steps) == ("done", 3, 3)


def test_steps_are_told(engine):
    job = engine.submit(bdm.Request(prompt="龙", steps=4))
    events = list(job.events())
    assert events[-1] == (4, 4)
    assert events == sorted(set(events))


def test_a_failing_request_ends_none_of_the_others(engine):
    with pytest.raises(bdm.UserError, match="sampler"):
        engine.submit(bdm.Request(prompt="龙", sampler="nothing"))
    bad = engine.submit(bdm.Request(prompt="龙", steps=2, height=30))
    good = engine.submit(bdm.Request(prompt="龙", steps=2))
    assert good.result(60).image.size == (64, 64)
    with pytest.raises(bdm.UserError, match="height 30"):
        bad.result(60)
    assert engine.stats()["failed"] == 1


def test_cancelled_and_full(pipe):
    engine = bdm.Engine(pipeline=pipe, device="cpu", queue_limit=3)
    told = []
    first = engine.submit(bdm.Request(prompt="龙", steps=900))
    next(first.events())
    jobs = [engine.submit(bdm.Request(prompt="龙", steps=2)) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.submit(bdm.Request(prompt="龙", steps=2))
    jobs[0].add_done_callback(lambda job: told.append(job.status))
    jobs[0].cancel()
    engine.submit(bdm.Request(prompt="龙", steps=2))
    first.cancel()
    with pytest.raises(Cancelled):
        first.result(60)
    assert first.step < 900
    assert told == ["cancelled"]
    assert jobs[1].result(60)
    engine.close()
    with pytest.raises(bdm.UserError, match="closed"):
        engine.submit(bdm.Request(prompt="龙"))


def test_closed_at_once_it_hands_back_what_is_left(pipe):
    engine = bdm.Engine(pipeline=pipe, device="cpu")
    jobs = [engine.submit(bdm.Request(prompt="龙", steps=900, seed=i)) for i in range(3)]
    assert engine.close(wait=False) == jobs
    assert all(job.status == "cancelled" for job in jobs)
