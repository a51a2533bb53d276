"""Tests of a checkout of diffusers (``BDM_DIFFUSERS``) on our pipelines; ``make test-peer`` runs them."""

from pathlib import Path

import pytest
from peer.checkout import folder

HERE = Path(__file__).parent

if folder() is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.peer)
            item.add_marker(pytest.mark.filterwarnings("default"))  # theirs are theirs
