"""diffusers' own tests of pipelines, on ours."""

import diffusers.pipelines
import pytest
from peer.cases import OURS
from peer.classes import classic, modern, with_reasons

SKIPPED: dict[str, str] = {}
FAILING: dict[str, str] = {}

for _name, _case in OURS.items():
    globals()[f"Test{_name}"] = with_reasons(modern(_case), _name, SKIPPED, FAILING)
    globals()[f"TestClassic{_name}"] = with_reasons(classic(_case), _name, SKIPPED, FAILING)


@pytest.fixture(autouse=True)
def _known_to_diffusers(monkeypatch):
    """One test reads a class's source by its name out of diffusers' package."""
    for case in OURS.values():
        monkeypatch.setattr(diffusers.pipelines, case.kind.__name__, case.kind, raising=False)
