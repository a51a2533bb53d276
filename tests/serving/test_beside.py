"""Requests with branches beside the model's own: drawn alone by the engine, and found by name alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from serving_running import running
from tiny import make_branch

import bdm
from bdm import BranchUse, FileRef, Request
from bdm.drawing.painter import Painter
from bdm.serving.limits import Limits


@pytest.fixture
def other(pipe, tmp_path):
    """A pipeline's folder with another branch."""
    folder = tmp_path / "models/checkpoints/other"
    pipe.save_pretrained(folder)
    torch.manual_seed(11)
    make_branch(pipe.unet).save_pretrained(folder / "branch")
    return folder


def pixels(drawn):
    return np.asarray(drawn.image).astype(int)


def test_the_engine_draws_it_as_the_painter_does_and_leaves_nothing_behind(pipe, other):
    beside = BranchUse(file=FileRef.to(other), prompt="红灯笼", scale=4.0)
    plain = Request(prompt="龙", steps=2, seed=5)
    told = replace(plain, beside=(beside,))
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        jobs = [engine.submit(request) for request in (plain, told, plain)]
        first, second, third = [pixels(job.result(600)) for job in jobs]
        assert engine.stats()["alone"] == 1
    assert "beside" in jobs[1].alone
    assert jobs[1].request.beside[0].file.hash
    assert jobs[1].request.model is not None
    (alone,) = Painter("cpu", given=(jobs[1].request.model, "fp32", pipe)).draw([jobs[1].request])
    assert np.array_equal(second, pixels(alone))
    assert abs(first - third).max() <= 1
    assert abs(first - second).max() > 1


def test_a_server_finds_it_by_name_and_no_path(tmp_path, other, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ask(file, **said):
        request = {"prompt": "龙", "steps": 1, "width": 32, "height": 32}
        request["beside"] = [{"file": file, "prompt": "月饼"} | said]
        return site.client.post("/v1/jobs", json={"request": request})

    limits = Limits(text=100)
    with running(tmp_path / "history", models=[tmp_path / "models"], limits=limits) as site:
        for name in (str(other), "../other", "~/other", "owner/name", "nothing"):
            answer = ask({"name": name})
            assert answer.status_code == 422, name
            assert str(tmp_path) not in answer.text.replace(name, "")
            asked = {"request": {"prompt": "龙", "branch": {"name": name}}}
            assert site.client.post("/v1/jobs", json=asked).status_code == 422, name
        asked = {"request": {"prompt": "龙", "width": 32, "height": 32, "branch": {"name": "other"}}}
        assert site.client.post("/v1/jobs", json=asked).status_code == 202
        assert ask({"name": "other"}).status_code == 202
        assert ask({"name": "other", "hash": "0" * 10}).status_code == 422
        assert "beside, prompt" in ask({"name": "other"}, prompt="龙" * 101).json()["detail"]
        assert "beside, scale" in ask({"name": "other"}, scale=1e9).json()["detail"]
