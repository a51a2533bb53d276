"""Requests enter and leave an engine; none depends on the others."""

import threading

import numpy as np
import pytest

import bdm
from bdm.drawing.painter import Painter
from bdm.serving.job import Cancelled, QueueFull
from bdm.speed.joined import JoinedBranch


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
        drawn = job.result(600)
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
    assert good.result(600).image.size == (64, 64)
    with pytest.raises(bdm.UserError, match="height 30"):
        bad.result(600)
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
        first.result(600)
    assert first.step < 900
    assert told == ["cancelled"]
    assert jobs[1].result(600)
    engine.close()
    with pytest.raises(bdm.UserError, match="closed"):
        engine.submit(bdm.Request(prompt="龙"))


def test_closed_at_once_it_hands_back_what_is_left(pipe):
    engine = bdm.Engine(pipeline=pipe, device="cpu")
    jobs = [engine.submit(bdm.Request(prompt="龙", steps=900, seed=i)) for i in range(3)]
    assert engine.close(wait=False) == jobs
    assert all(job.status == "cancelled" for job in jobs)


def test_closed_while_one_is_on_its_way_in_it_hands_that_back_too(pipe, monkeypatch):
    """Loading a request's model takes seconds, and it is in no queue then."""
    engine = bdm.Engine(pipeline=pipe, device="cpu")
    loading, closing, load = threading.Event(), threading.Event(), engine._batch_for

    def slowly(request):
        loading.set()
        closing.wait(60)
        return load(request)

    monkeypatch.setattr(engine, "_batch_for", slowly)
    jobs = [engine.submit(bdm.Request(prompt="龙", steps=900, seed=i)) for i in range(2)]
    assert loading.wait(60)
    assert engine.stats()["running"] == 1
    monkeypatch.setattr(jobs[0], "cancel", lambda cancel=jobs[0].cancel: (cancel(), closing.set()))
    assert engine.close(wait=False) == jobs
    assert [job.status for job in jobs] == ["cancelled"] * 2


def test_requests_join_and_leave(engine):
    first = engine.submit(bdm.Request(prompt="龙", steps=500, seed=1))
    next(first.events())
    others = [engine.submit(bdm.Request(prompt="月饼", steps=3, seed=i)) for i in range(3)]
    for job in others:
        assert job.result(600).request.versions.together >= 2
    assert first.status == "running"
    first.cancel()
    with pytest.raises(Cancelled):
        first.result(600)
    assert engine.stats()["batch_mean"] > 1


def test_what_cannot_join_is_drawn_alone_and_named(engine):
    saving = bdm.Approximation(branch_every=2)
    job = engine.submit(bdm.Request(prompt="龙", steps=2, approximation=saving))
    assert "branch_every" in job.alone
    assert job.result(600)
    assert engine.stats()["alone"] == 1


def test_nan_is_refused_and_ends_none_of_the_others(engine, monkeypatch):
    plain = JoinedBranch.__call__

    def broken(self, calls):
        found = plain(self, calls)
        for call, (_, middle) in zip(calls, found, strict=True):
            if call["conditioning_scale"] == 0.25:
                middle.fill_(float("nan"))
        return found

    monkeypatch.setattr(JoinedBranch, "__call__", broken)
    bad = engine.submit(bdm.Request(prompt="龙", steps=3, branch_scale=0.25))
    good = engine.submit(bdm.Request(prompt="龙", steps=3))
    assert good.result(600)
    with pytest.raises(bdm.UserError, match="NaN"):
        bad.result(600)


def test_adapters_act_on_their_own_drawings_alone(engine, files):
    ink = bdm.PluginUse(kind="adapter", file=bdm.FileRef.to(files["ink"]), strength=0.8)
    asked = [bdm.Request(prompt="龙", steps=3, plugins=(ink,) if i % 2 else ()) for i in range(4)]
    drawn = [job.result(600) for job in [engine.submit(request) for request in asked]]
    assert abs(pixels(drawn[0]) - pixels(drawn[2])).max() <= 1
    assert abs(pixels(drawn[1]) - pixels(drawn[3])).max() <= 1
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() > 1


def test_previews(engine):
    job = engine.submit(bdm.Request(prompt="龙", steps=6))
    assert job.preview() is None or job.preview().size == (64, 64)
    for _ in job.events():
        shown = job.preview()
        assert shown is not None
        assert shown.size == (64, 64)
    assert job.preview() is job.result().image


def test_a_callback_that_fails_ends_nothing(engine, caplog):
    job = engine.submit(bdm.Request(prompt="龙", steps=1))
    job.add_done_callback(lambda job: 1 / 0)
    job.result(600)
    assert engine.submit(bdm.Request(prompt="龙", steps=1)).result(600)
