"""One pipeline's parts in another: what diffusers calls ``from_pipe``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..errors import UserError
from ..formats.load_options import read_options

#: Options of diffusers' ``from_pipe`` that are no parts.
_OPTIONS = ("dtype", "torch_dtype", "custom_pipeline", "custom_revision", "trust_remote_code")


@dataclass(frozen=True)
class ReusedParts:
    """What another pipeline is made of.

    Attributes:
        arguments: of its constructor, by name.
        noted: what its configuration keeps of the first one's, so that the way back finds it.
        dtype: to which everything is cast; None leaves all as it is.
    """

    arguments: dict[str, Any]
    noted: dict[str, Any]
    dtype: torch.dtype | None


def reuse_parts(kind: Any, pipeline: Any, changes: Mapping[str, Any]) -> ReusedParts:
    """The parts of a pipeline for another class of pipelines.

    Args:
        kind: that class.
        pipeline: whose parts are taken.
        changes: parts instead of the pipeline's, and ``dtype``.

    Raises:
        UserError: an unknown name, a part that is missing or of another kind, or no pipeline.
    """
    reader = f"{kind.__name__}.from_pipe"
    parts, config = getattr(pipeline, "components", None), getattr(pipeline, "config", None)
    if not isinstance(parts, Mapping) or not isinstance(config, Mapping):
        raise UserError(f"{reader}: a {type(pipeline).__name__} is no pipeline of diffusers; give one")
    wanted = {name: p for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    options = {name: changes[name] for name in _OPTIONS if name in changes}
    given = {name: value for name, value in changes.items() if name not in _OPTIONS}
    if unknown := [name for name in given if name not in wanted]:
        close = difflib.get_close_matches(unknown[0], wanted, n=1) or [f"one of {', '.join(wanted)}"]
        raise UserError(f"{reader} takes no {unknown[0]!r}; did you mean {close[0]}?")
    arguments = {name: parts[name] for name in wanted if name in parts} | _settings(wanted, config) | given
    needed = (name for name, p in wanted.items() if p.default is p.empty)
    if missing := [name for name in needed if name not in arguments]:
        raise UserError(f"{reader}: a {type(pipeline).__name__} has no {missing[0]}; give {missing[0]}=")
    unet = arguments["unet"]
    if "unet" not in given and unet is not None and not isinstance(unet, UNet2DConditionModel):
        raise UserError(
            f"{reader}: the unet of {type(pipeline).__name__} is a {type(unet).__name__}, not a"
            " UNet2DConditionModel; give unet="
        )
    noted = {_hidden(name): value for name, value in config.items() if name not in arguments}
    return ReusedParts(arguments, noted, read_options(options, reader, default=None).dtype)


def _settings(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments that are no parts, such as ``requires_safety_checker``.

    A configuration keeps those that its own class does not take under a name with an underscore.
    """
    return {
        name: config[key]
        for name in wanted
        for key in (f"_{name}", name)
        if key in config and not isinstance(config[key], list | tuple)
    }


def _hidden(name: str) -> str:
    return name if name.startswith("_") else f"_{name}"
