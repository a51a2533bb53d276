"""Prompts -> picture files, over any number of processes.

Pictures that are there already are not drawn again. One that cannot be drawn ends none of the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, first_line
from ..speed.approximate import EXACT, Approximation
from .grid import save_picture
from .picture_info import describe, picture_info
from .prompt_file import Failure as Failure
from .prompt_file import Request as Request
from .prompt_file import read_requests as read_requests

#: So many failures are named with their reasons, the others by their lines.
_MOST_REASONS = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all pictures of a run have in common; arguments of ``BridgePipeline`` under the same names."""

    model: str
    steps: int
    guidance: float
    english_guidance: float | None = None
    sampler: str | None = None
    branch_scale: float = 1.0
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    enlarge: int = 1
    control_images: Mapping[str, Any] | None = None
    approximation: Approximation = field(default=EXACT)


def missing(requests: Iterable[Request]) -> list[Request]:
    """The pictures that are not there yet."""
    return [request for request in requests if not os.path.exists(request.path)]


def draw_requests(pipe: Any, requests: Sequence[Request], settings: Settings) -> list[Path]:
    """Draw pictures together and write them; returns their files.

    A picture does not depend on which others are drawn with it: its noise is drawn from its own seed on the
        CPU.

    Raises:
        UserError: whatever the pipeline refuses, a folder that cannot be written, or a picture that is none
            (NaN); those that are some are written before.
    """
    images = pipe(
        [r.prompt for r in requests],
        [r.negative for r in requests],
        prompt_en=[r.prompt_en for r in requests],
        negative_prompt_en=[r.negative_en for r in requests],
        generator=[torch.Generator().manual_seed(r.seed) for r in requests],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        english_guidance=settings.english_guidance,
        branch_scale=settings.branch_scale,
        width=settings.width,
        height=settings.height,
        clip_skip=settings.clip_skip,
        control_images=settings.control_images,
        approximation=settings.approximation,
        output_type="pt",
    ).images
    none = [r for r, image in zip(requests, images, strict=True) if not image.isfinite().all()]
    for request, image in zip(requests, images, strict=True):
        if request not in none:
            _save(pipe, request, image, settings)
    if none:
        raise UserError(
            f"the picture for {none[0].prompt[:60]!r} came out as NaN; use a smaller guidance or"
            " branch scale, smaller strengths and weights in brackets, or more precision (fp32)"
        )
    return [request.path for request in requests]


def _save(pipe: Any, request: Request, image: Tensor, settings: Settings) -> None:
    """Write a picture (3, H, W) in [0, 1] with how it was made."""
    (picture,) = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(image[None]))
    facts = describe(
        prompt=request.prompt,
        negative=request.negative,
        prompt_en=request.prompt_en,
        negative_en=request.negative_en,
        seed=request.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        english_guidance=settings.english_guidance,
        sampler=settings.sampler or type(pipe.scheduler).__name__,
        branch_scale=settings.branch_scale,
        size=picture.size,
        model=settings.model,
        clip_skip=settings.clip_skip,
        plugins=list(pipe.plugins),
    )
    size = (picture.width * settings.enlarge, picture.height * settings.enlarge)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    save_picture(picture, request.path, **picture_info(facts, request.path.suffix))


def draw_each(draw: Callable[[list[Request]], Any], requests: Sequence[Request]) -> list[Failure]:
    """Draw pictures together or, where that fails, each for itself; returns those that cannot be drawn.

    Args:
        draw: draws some and writes them.
        requests: what to draw.

    """
    try:
        draw(list(requests))
        return []
    except Exception as error:  # a line may make any library fail
        if len(requests) == 1:
            return [_failure(requests[0], error)]
    return [failure for request in missing(requests) for failure in draw_each(draw, [request])]


def refuse_common_failure(failed: Sequence[Failure], requests: Sequence[Request]) -> None:
    """Stop where several lines all fail of the same, which is no line's fault.

    Raises:
        UserError: names it.
    """
    lines = {request.line for request in requests}
    if len(failed) == len(requests) and len(lines) > 1 and len({failure.why for failure in failed}) == 1:
        raise UserError(f"{failed[0]}; so does every other line")


def _failure(request: Request, error: Exception) -> Failure:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    where = f"line {request.line} ({request.path.name})" if request.line else str(request.path)
    return Failure(where, f"cannot be drawn: {kind}{first_line(error, 300)}")


def refuse_failures(failed: Sequence[Failure], pictures: int) -> None:
    """Say which lines of a file gave no picture.

    Args:
        failed: in any order.
        pictures: that are there.

    Raises:
        UserError: there are some; counts and names them.
    """
    if failed:
        reasons = "; ".join(str(failure)[:400] for failure in failed[:_MOST_REASONS])
        rest = ", ".join(failure.what for failure in failed[_MOST_REASONS:])
        raise UserError(
            f"{len(failed)} gave no picture and {pictures} did: {reasons}"
            + (f"; also {rest}" if rest else "")
        )
