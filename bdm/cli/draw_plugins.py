"""The plug-ins that the options of ``infer`` name."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ..errors import UserError


def attach_plugins(pipe: Any, options: argparse.Namespace) -> dict[str, Any] | None:
    """Attach what the command line names; returns the control pictures by ControlNet."""
    from ..plugins.controlnet import annotate, open_picture

    if len(options.controlnet) != len(options.control_image):
        raise UserError(
            f"{len(options.controlnet)} --controlnet and {len(options.control_image)} --control-image; give"
            " one image for each"
        )
    # An embedding's name is its trigger word, so it has the first choice.
    for source in options.embedding:
        pipe.plugins.attach(source, kind="embedding")
    for kind, source in (("checkpoint", options.checkpoint), ("vae", options.vae)):
        if source:
            pipe.plugins.attach(source, _free_name(pipe, source), kind=kind)
    for text in options.lora:
        source, numbers = split_numbers(text, "--lora", (0, 1, 2))
        settings = dict(zip(("strength", "text_strength"), numbers, strict=False))
        pipe.plugins.attach(source, _free_name(pipe, source), kind="adapter", **settings)
    pictures = {}
    for i, (source, text) in enumerate(zip(options.controlnet, options.control_image, strict=True)):
        image, numbers = split_numbers(text, "--control-image", (0, 1, 3))
        picture = annotate(open_picture(image), options.annotator)
        settings = dict(zip(("strength", "start", "end"), numbers, strict=False))
        name = _free_name(pipe, f"controlnet-{i}")
        pictures[pipe.plugins.attach(source, name, kind="controlnet", **settings).name] = picture
    triggers = [word for plugin in pipe.plugins for word in plugin.words]
    if triggers and not (options.prompt_en or options.negative_en):
        logging.warning(
            "embeddings act through the English prompt; --prompt-en or --negative-en must name %s",
            ", ".join(triggers),
        )
    return pictures or None


def _free_name(pipe: Any, source: str) -> str:
    """The file's stem, numbered where it is taken: many files are called model.safetensors."""
    stem = Path(source).stem
    names = (stem, *(f"{stem}-{i}" for i in range(2, 100)))
    return next(name for name in names if name not in pipe.plugins)


def split_numbers(text: str, option: str, counts: tuple[int, ...]) -> tuple[str, list[float]]:
    """Split "FILE:0.8:0.5" into the file and its numbers; colons inside the file's name stay.

    Raises:
        UserError: another count of numbers than allowed.
    """
    parts = text.split(":")
    numbers: list[float] = []
    while len(parts) > 1 and len(numbers) < max(counts):
        try:
            numbers.insert(0, float(parts[-1]))
        except ValueError:
            break
        parts.pop()
    if len(numbers) not in counts:
        raise UserError(
            f"{option} {text}: {len(numbers)} numbers behind the file; allowed are"
            f" {' or '.join(map(str, counts))}"
        )
    return ":".join(parts), numbers
