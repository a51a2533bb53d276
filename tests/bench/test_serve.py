"""Requests at once: both sides draw the same, and the figures are what they claim to be."""

import numpy as np
import pytest

from bdm.bench import serve
from bdm.bench.serve import Run
from bdm.config import BenchServeConfig
from bdm.errors import UserError


def test_joined_beside_one_by_one(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    config = BenchServeConfig(
        kind="serve", out=tmp_path, model=tmp_path / "model", requests=2, steps=2, pairs=1
    )
    figures = serve.measure(config)
    assert figures["ratio"] == pytest.approx(
        figures["seconds"]["joined"] / figures["seconds"]["one by one"], 1e-2
    )
    assert len(figures["finished"]["joined"]) == 2
    assert "joined / one by one" in serve.table(figures)
    second = figures["second_picture"]
    assert 0 < second["steps"] < second["seconds"]
    assert second["beyond"] == pytest.approx(second["seconds"] - second["steps"], abs=2e-4)


def test_no_order_has_pictures_before_their_work_is_done():
    runs = [Run([4.0] * 16, 4.0, []), Run([8.0] * 16, 8.0, [])]
    assert serve.least_p95(runs) == 6.0 * 15 / 16
    assert all(serve.least_p95([run]) <= run.p95 for run in runs)


def test_pictures_that_differ_are_no_comparison():
    one, other = np.zeros((2, 2, 3)), np.full((2, 2, 3), 9)
    with pytest.raises(UserError, match="differ from those drawn alone by 9"):
        serve._check({"one by one": [Run([1.0], 1.0, [one])], "joined": [Run([1.0], 1.0, [other])]})
