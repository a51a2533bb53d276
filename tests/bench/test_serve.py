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
        kind="serve", out=tmp_path, model=tmp_path / "model", requests=2, steps=1, pairs=1
    )
    figures = serve.measure(config)
    assert figures["ratio"] == pytest.approx(
        figures["seconds"]["joined"] / figures["seconds"]["one by one"], 1e-2
    )
    assert len(figures["finished"]["joined"]) == 2
    assert "joined / one by one" in serve.table(figures)


def test_pictures_that_differ_are_no_comparison():
    one, other = np.zeros((2, 2, 3)), np.full((2, 2, 3), 9)
    with pytest.raises(UserError, match="differ from those drawn alone by 9"):
        serve._check({"one by one": [Run([1.0], 1.0, [one])], "joined": [Run([1.0], 1.0, [other])]})
