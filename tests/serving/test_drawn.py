"""The server before the real engine: pictures are those that ``bdm.draw`` gives."""

import json

import httpx
import numpy as np
import pytest
import webuiapi
from serving_running import running

import bdm
from bdm.drawing.library import DEFAULT_MODEL
from bdm.serving.engine import Engine

pytestmark = pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="assets/emoji is missing")


def test_a_clients_picture_is_the_one_that_bdm_draws(tmp_path):
    texts = {"prompt": "红灯笼", "prompt_en": "masterpiece"}
    (alone,) = bdm.draw(bdm.Request(**texts, seed=7, steps=3, guidance=2.0, sampler="Euler a"))
    with running(tmp_path, lambda library: Engine(models=library, device="cpu")) as site:
        api = webuiapi.WebUIApi(host="127.0.0.1", port=site.port)
        said = {"width": 32, "height": 32, "steps": 3, "cfg_scale": 2, "seed": 7, "sampler_name": "Euler a"}
        result = api.txt2img(prompt="红灯笼，masterpiece", **said)
        difference = np.asarray(result.image, int) - np.asarray(alone.image, int)
        assert np.abs(difference).max() <= 1
        headers = {"accept": "text/event-stream"}
        body = {"request": {"prompt": "月饼", "steps": 4}}
        with httpx.stream(
            "POST", f"{site.address}/v1/jobs", json=body, headers=headers, timeout=300
        ) as answer:
            lines = list(answer.iter_lines())
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names[-2:] == ["done", "end"]
        assert "preview" in names
        steps = [json.loads(line[6:]) for line in lines if line.startswith('data: {"id"')]
        assert max(one.get("step", 0) for one in steps) >= 3
        assert site.client.get("/metrics").text.count("bdm_engine_") > 4
