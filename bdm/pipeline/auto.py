"""diffusers' ``AutoPipelineFor...`` know the bilingual pipelines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: Imports every pipeline that diffusers has, so it is not imported for this alone.
_AUTO = "diffusers.pipelines.auto_pipeline"


def register(pipelines: Mapping[str, Mapping[str, type]]) -> None:
    """Enter pipelines in the tables of ``AutoPipelineFor...``, now or when diffusers makes them.

    diffusers has no way for others to ask for that, but its tables are dictionaries from a model's name to
    its pipeline, one for each task. Rows under a name of our own change nothing for diffusers' models.

    Args:
        pipelines: by table, such as "AUTO_INPAINT_PIPELINES_MAPPING", and by model's name.
    """

    def enter(module: ModuleType) -> None:
        for table, rows in pipelines.items():
            getattr(module, table, {}).update(rows)

    if _AUTO in sys.modules:
        enter(sys.modules[_AUTO])
    else:
        sys.meta_path.insert(0, _WhenImported(_AUTO, enter))


class _WhenImported(MetaPathFinder):
    """Does something with a module, once, as soon as it is imported.

    Args:
        name: of the module.
        action: what is done.
    """

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, whose loader then acts; None for other modules."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_act(module: ModuleType) -> None:
                load(module)
                self._action(module)

            loader.exec_module = load_and_act
        return spec
