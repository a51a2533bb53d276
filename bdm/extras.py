"""Packages that only some settings need."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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
            raise UserError(f"{setting} needs the package {module}, which is not installed; run: pip install {package}")


def import_extra(setting: str, name: str = "") -> Any:
    """The module that a setting needs, or one inside it: ``import_extra("a parquet file", "parquet")``.

    Raises:
        UserError: it is not installed; names the command that installs it.
    """
    require_packages(setting)
    return import_module(f"{PACKAGES[setting][1]}.{name}".rstrip("."))
