"""Optimizers as parameters of tests: those that need an extra are skipped where it is missing."""

from importlib.util import find_spec

import pytest


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


NAMES = [
    "adamw",
    pytest.param("adamw8bit", marks=needs("bitsandbytes")),
    pytest.param("prodigy", marks=needs("prodigyopt")),
]
