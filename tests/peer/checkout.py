"""The test classes of a checkout of diffusers, which its wheel does not hold.

``BDM_DIFFUSERS`` names the checkout's folder. Its tests are read from there and run against the diffusers
that is installed.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: Not "tests", which is what pytest calls ours.
_PACKAGE = "diffusers_tests"


def folder() -> Path | None:
    """The checkout's tests; None where no checkout is named."""
    named = os.environ.get("BDM_DIFFUSERS")
    return Path(named, "tests") if named else None


def markers() -> set[str]:
    """The names of pytest's markers that the checkout's tests have."""
    tests = folder()
    text = (tests / "testing_utils.py").read_text(encoding="utf-8") if tests else ""
    return set(re.findall(r"pytest\.mark\.(\w+)", text))


def module(name: str) -> Any:
    """A module of the checkout's tests, such as "pipelines.testing_utils"."""
    tests = folder()
    assert tests is not None, "BDM_DIFFUSERS names no checkout of diffusers"
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(tests)]
        sys.modules[_PACKAGE] = package
        _stand_in_for_packages()
    loaded = importlib.import_module(f"{_PACKAGE}.{name}")
    torch.use_deterministic_algorithms(False)  # some modules set it for whatever runs after them
    return loaded


def _stand_in_for_packages() -> None:
    """Beside helpers that tests of pipelines use stand tests of models, which need further packages.

    Those are not run, so anything does that decorates them.
    """
    for name in ("parameterized", "requests_mock"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            spare: Any = ModuleType(name)
            spare.parameterized = spare.parameterized_class = _Leave()
            sys.modules[name] = spare


class _Leave:
    """Decorators that leave what they decorate."""

    def expand(self, *_: Any, **__: Any) -> Any:
        return lambda test: test

    def __call__(self, *_: Any, **__: Any) -> Any:
        return lambda test: test
