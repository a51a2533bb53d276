"""diffusers' own tests of pipelines, on ours."""

import diffusers.pipelines
import pytest
from peer.cases import OURS
from peer.classes import classes

SKIPPED: dict[str, str] = {}
FAILING: dict[str, str] = {}

globals().update(classes(OURS, SKIPPED, FAILING))


@pytest.fixture(autouse=True)
def _known_to_diffusers(monkeypatch):
    """One test reads a class's source by its name out of diffusers' package."""
    for case in OURS.values():
        monkeypatch.setattr(diffusers.pipelines, case.kind.__name__, case.kind, raising=False)
