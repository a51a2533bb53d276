"""Pictures are drawn by engines in other processes, and whoever serves notices nothing of it."""

import asyncio
import queue
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from serving_fake import FakeEngine
from serving_running import running

import bdm
from bdm.errors import UserError
from bdm.parallel import ray as cluster_module
from bdm.parallel.ray import run_on_ray
from bdm.serving.job import Cancelled, QueueFull
from bdm.serving.names import served_library
from bdm.serving.ray_replicas import _checked
from bdm.serving.replica import Replica, ReplicaSettings
from bdm.serving.replicas import Call, Lost, ReplicaEngine
from bdm.serving.shipping import packed, unpacked
from bdm.serving.uploads import Uploads


class Here:
    """Replicas in event loops of threads of this process, which requests go to in turn."""

    def __init__(self, count=1, make_engine=FakeEngine, settings=None):
        self.replicas = [Replica(settings or ReplicaSettings(), make_engine) for _ in range(count)]
        self.sent, self.kill = 0, threading.Event()

    def close(self):
        for replica in self.replicas:
            replica.close()

    def __call__(self, request, pictures):
        replica = self.replicas[self.sent % len(self.replicas)]
        self.sent += 1
        told, loop = queue.Queue(), asyncio.new_event_loop()

        async def follow():
            try:
                async for news in replica.draw(request, pictures):
                    told.put(news)
                told.put(None)
            except asyncio.CancelledError:
                told.put(Cancelled("cancelled"))
            except Exception as error:
                told.put(error)

        task = loop.create_task(follow())

        def run():
            loop.run_until_complete(task)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def news():
            while (one := told.get(timeout=60)) is not None:
                if isinstance(one, Exception):
                    raise one
                yield one
                if self.kill.is_set():
                    self.kill.clear()
                    loop.call_soon_threadsafe(task.cancel)
                    raise Lost("the replica has died")

        def cancel():
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        return Call(news(), cancel)


def slow(library):
    return FakeEngine(library, 0.02)


@pytest.fixture
def engine():
    here = Here(2, slow)
    engine = ReplicaEngine(here, 2)
    engine.here = here
    yield engine
    engine.close()
    here.close()


def asked(**said):
    return bdm.Request(**{"prompt": "红灯笼", "steps": 4, "width": 32, "height": 32} | said)


def until(said):
    end = time.monotonic() + 30
    while not said():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_jobs_go_to_replicas_and_come_back(engine):
    jobs = [engine.submit(asked(seed=i)) for i in range(4)]
    drawn = [job.result(60) for job in jobs]
    assert [one.request.seed for one in drawn] == [0, 1, 2, 3]
    assert [job.status for job in jobs] == ["done"] * 4
    assert all(job.request.guidance is not None for job in jobs), "complete"
    assert [len(replica._engine.seen) for replica in engine.here.replicas] == [2, 2]
    until(lambda: engine.stats()["drawn"] == 4)
    assert engine.stats()["replicas"] == 2
    assert engine.stats()["steps"] == 2, "of each engine as it was at its last picture"


def test_steps_and_previews_are_told(engine):
    job = engine.submit(asked(steps=40))
    seen = list(job.events())
    assert seen == sorted(set(seen))
    assert seen[-1][1] == 40
    assert len(seen) > 2
    other = engine.submit(asked(steps=40))
    next(other.events())
    until(lambda: other.preview() is not None)
    assert isinstance(other.preview(), Image.Image)


def test_what_cannot_be_drawn_is_refused_at_once(engine):
    with pytest.raises(UserError, match="sampler"):
        engine.submit(asked(sampler="nothing"))
    for replica in engine.here.replicas:
        replica._engine.limit = 0
    with pytest.raises(QueueFull):
        engine.submit(asked())
    assert engine.stats()["failed"] == 0
    assert not engine._live


def test_a_cancelled_one_is_cancelled_where_it_is_drawn(engine):
    job = engine.submit(asked(steps=1000))
    next(job.events())
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(60)
    (far,) = engine.here.replicas[0]._engine.seen
    until(lambda: far.status == "cancelled")
    waiting = engine.submit(asked(steps=1000))
    waiting.cancel()
    assert waiting.status == "cancelled"
    assert engine.submit(asked(seed=8)).result(60).request.seed == 8


def test_where_a_replica_dies_another_draws(engine):
    job = engine.submit(asked(steps=60, seed=5))
    next(job.events())
    engine.here.kill.set()
    assert job.result(60).request.seed == 5
    assert engine.here.sent == 2


def test_one_over_which_every_replica_dies_ends_alone(engine, monkeypatch):
    def dying(request, pictures):
        def news():
            raise Lost("out of memory")
            yield

        return Call(news(), lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_send", dying)
        with pytest.raises(UserError, match="3 replicas have died over this: out of memory"):
            engine.submit(asked())
    assert engine.submit(asked()).result(60)


def test_closed_it_finishes_or_hands_back(engine):
    job = engine.submit(asked(steps=10))
    ended = []
    here = Here(1, slow)
    other = ReplicaEngine(here, 1, lambda: (here.close(), ended.append(True)))
    left = other.submit(asked(steps=1000))
    assert other.close(wait=False) == [left]
    assert ended == [True]
    engine.close()
    assert job.status == "done"
    with pytest.raises(UserError, match="closed"):
        engine.submit(asked())


def test_pictures_travel_and_models_are_known_by_their_hash(files, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "sent.png")
    sent = Uploads(here, 10_000).keep((tmp_path / "sent.png").read_bytes())
    library = served_library([files["ink"].parent])
    ink = library.located(bdm.FileRef.to(files["ink"]), "adapter")
    mode = bdm.Mode("image", (("image", sent),), (("strength", 0.5),))
    uses = [
        bdm.PluginUse(kind="adapter", file=ink),
        bdm.PluginUse(kind="adapter", file=bdm.FileRef("x", "12")),
    ]
    request = asked(mode=mode, plugins=uses)
    pictures = packed(request)
    sent.source.unlink()
    found = unpacked(request, pictures, Uploads(there, 10_000))
    assert found == request
    ((_, picture),) = found.mode.pictures
    assert picture.source.parent == there
    assert np.array_equal(np.asarray(Image.open(picture.source)), np.full((64, 64, 3), (255, 0, 0)))
    assert found.plugins[0].file.source == ink.source

    ink.source.rename(ink.source.with_name("blue.safetensors"))
    away = unpacked(request, pictures, Uploads(there, 10_000)).plugins[0].file
    assert away.source is None, "another place, or another file there"
    again = served_library([files["ink"].parent]).located(away, "adapter")
    assert again.source.name == "blue.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        packed(request)


def test_a_server_draws_with_replicas(tmp_path):
    here = Here(2)
    with running(tmp_path / "history", lambda library: ReplicaEngine(here, 2, here.close)) as server:
        body = {"prompt": "红灯笼", "width": 32, "height": 32, "batch_size": 4}
        answer = server.client.post("/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["images"]) == 4
        wrong = server.client.post("/sdapi/v1/txt2img", json=body | {"sampler_name": "nothing"})
        assert wrong.status_code == 422
        figures = server.client.get("/metrics").text
        assert "bdm_engine_replicas 2.0" in figures
        assert "bdm_engine_drawn 4.0" in figures
    assert [len(replica._engine.seen) for replica in here.replicas] == [2, 2]


def test_more_replicas_than_there_is_place_for_are_refused():
    assert _checked(None, 3, 8) == 3
    assert _checked(None, 0, 8) == 1
    for count, graphics in ((4, 3), (9, 0), (0, 0)):
        with pytest.raises(UserError, match=f"--replicas {count}: the cluster has {graphics or 8}"):
            _checked(count, graphics, 8)


def test_a_cluster_that_cannot_be_used_is_named(monkeypatch):
    def init(**settings):
        raise ConnectionError("nobody listens")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(cluster_module, "import_extra", lambda need: ray)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"RAY_ADDRESS 10\.0\.0\.1:6379 cannot be used \(nobody listens\)"):
        run_on_ray(None, (), [1], 1, "drawing")
    assert run_on_ray(None, (), [], 0, "drawing") == []


@pytest.mark.slow
def test_on_a_real_cluster(tmp_path):
    pytest.importorskip("ray.serve")
    from bdm.serving.ray_replicas import ray_engine

    small = dict(steps=4, width=None, height=None, prompt="红灯笼")
    with bdm.Engine(device="cpu") as own:
        alone = own.submit(asked(**small, seed=3)).result(600)
    engine = ray_engine(ReplicaSettings(device="cpu"), 1, "bdm-test")
    try:
        jobs = [engine.submit(asked(**small, seed=seed)) for seed in (3, 4)]
        long = engine.submit(asked(**small | {"steps": 900}))
        drawn = [job.result(600) for job in jobs]
        assert abs(np.asarray(drawn[0].image, int) - np.asarray(alone.image, int)).max() <= 1
        assert drawn[0].request == replace(alone.request, versions=drawn[0].request.versions)
        next(long.events())
        long.cancel()
        with pytest.raises(Cancelled):
            long.result(60)
        with pytest.raises(UserError, match="sampler"):
            engine.submit(asked(sampler="nothing"))
        assert engine.stats()["drawn"] == 2
    finally:
        engine.close()


@pytest.mark.slow
def test_what_a_killed_server_left_on_a_cluster_ends_when_it_starts_again():
    serve = pytest.importorskip("ray.serve")
    from bdm.parallel.ray import cluster
    from bdm.serving.ray_replicas import ray_engine

    small, settings = asked(steps=2, width=None, height=None), ReplicaSettings(device="cpu")
    with cluster():  # which goes on when an engine ends
        left = ray_engine(settings, 1, "bdm-again")
        left.submit(small).result(600)
        again = ray_engine(settings, 1, "bdm-again")
        again.submit(small).result(600)
        until(lambda: again._told)
        assert left._told.keys() != again._told.keys()
        states = serve.status().applications["bdm-again"].deployments["replica"].replica_states
        assert sum(states.values()) == 1
        again.close()
        assert not serve.status().applications
        with pytest.raises(UserError, match="--replicas 99: the cluster has"):
            ray_engine(settings, 99, "bdm-again")
