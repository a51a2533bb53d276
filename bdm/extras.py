"""Packages that only some settings need."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import UserError

#: Setting -> the pip package that it needs, and the module in it.
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "swanlab": ("swanlab", "swanlab"),
    "wandb": ("wandb", "wandb"),
}


def require_packages(*settings: str) -> None:
    """Check that what settings need is installed, without importing it.

    Raises:
        UserError: it is not; names the command that installs it.
    """
    for setting in settings:
        package, module = PACKAGES.get(setting, (None, None))
        if module is not None and find_spec(module) is None:
            raise UserError(f"{setting} needs the package {package}, which is not installed; run: pip install {package}")
