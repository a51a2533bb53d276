"""Packages that only some settings need, and files of packages that are not to be imported."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UserError

#: Setting -> what pip installs for it, and the module in it.
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "swanlab": ("swanlab", "swanlab"),
    "wandb": ("wandb", "wandb"),
    "--engine ray": ("'bdm[ray]'", "ray"),
    "a parquet file": ("'bdm[parquet]'", "pyarrow"),
    "an annotator other than canny": ("'bdm[annotators]'", "controlnet_aux"),
}


def require_packages(*settings: str) -> None:
    """Check that what settings need is installed, without importing it.

    Raises:
        UserError: it is not; names the command that installs it.
    """
    for setting in settings:
        package, module = PACKAGES.get(setting, (None, None))
        if module is not None and find_spec(module) is None:
            raise UserError(
                f"{setting} needs the package {module}, which is not installed; run: pip install {package}"
            )


def import_extra(setting: str, name: str = "") -> Any:
    """The module that a setting needs, or one inside it: ``import_extra("a parquet file", "parquet")``.

    Raises:
        UserError: it is not installed; names the command that installs it.
    """
    require_packages(setting)
    return import_module(f"{PACKAGES[setting][1]}.{name}".rstrip("."))


def package_file(package: str, path: str) -> Path:
    """A file of an installed package. The package is not imported, which may take seconds for one vocabulary.

    Raises:
        UserError: the package is not installed.
    """
    return _package_folder(package) / path


@cache
def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is missing; install bdm again with its dependencies")
    return Path(next(iter(spec.submodule_search_locations)))
