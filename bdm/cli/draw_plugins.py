"""The plug-ins that the options of ``infer`` name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..drawing.library import Library
    from ..drawing.request import PluginUse


def named_plugins(options: argparse.Namespace, library: Library) -> Iterator[PluginUse]:
    """The plug-ins of a command line.

    Args:
        options: the command's.
        library: where files are looked for by name.

    Raises:
        UserError: a count of numbers that means nothing, or of control images; a file's name that is several
            files'.
    """
    from ..drawing.request import FileRef, PluginUse

    if len(options.controlnet) != len(options.control_image):
        raise UserError(
            f"{len(options.controlnet)} --controlnet and {len(options.control_image)} --control-image; give"
            " one image for each"
        )
    for source in options.embedding:
        yield PluginUse(kind="embedding", file=FileRef.to(library.find(source, "embedding")))
    for kind, source in (("checkpoint", options.checkpoint), ("vae", options.vae)):
        if source:
            yield PluginUse(kind=kind, file=FileRef.to(library.find(source, kind)))
    for text in options.lora:
        source, numbers = split_numbers(text, "--lora", (0, 1, 2))
        settings = dict(zip(("strength", "text_strength"), numbers, strict=False))
        yield PluginUse(kind="adapter", file=FileRef.to(library.find(source, "adapter")), **settings)
    yield from _ip_adapter(options, library)
    for i, (source, text) in enumerate(zip(options.controlnet, options.control_image, strict=True)):
        image, numbers = split_numbers(text, "--control-image", (0, 1, 3))
        window: dict[str, Any] = dict(zip(("strength", "start", "end"), numbers, strict=False))
        yield PluginUse(
            kind="controlnet",
            file=FileRef.to(library.find(source, "controlnet")),
            name=f"controlnet-{i}",
            picture=FileRef.to(image),
            annotator=options.annotator,
            **window,
        )


def _ip_adapter(options: argparse.Namespace, library: Library) -> Iterator[PluginUse]:
    from ..drawing.request import FileRef, PluginUse

    beside = {
        "--ip-image": options.ip_image,
        "--ip-scale": options.ip_scale,
        "--ip-encoder": options.ip_encoder,
    }
    given = [name for name, value in beside.items() if value is not None]
    if options.ip_adapter is None:
        if given:
            raise UserError(f"{given[0]} is of an IP-Adapter; give its file with --ip-adapter")
        return
    if options.ip_image is None:
        raise UserError("--ip-adapter needs --ip-image, the picture that it shows to the backbone")
    encoder = None
    if options.ip_encoder is not None:
        encoder = FileRef.to(library.find(options.ip_encoder, "image_encoder"))
    yield PluginUse(
        kind="ip_adapter",
        file=FileRef.to(library.find(options.ip_adapter, "ip_adapter")),
        picture=FileRef.to(options.ip_image),
        strength=1.0 if options.ip_scale is None else options.ip_scale,
        encoder=encoder,
    )


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
