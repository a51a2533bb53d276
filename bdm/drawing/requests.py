"""Prompts -> picture files, over any number of processes.

Pictures that are there already are not drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..speed.approximate import EXACT, Approximation
from .grid import save_picture
from .picture_info import describe, picture_info

#: What a line of a prompt file may say of its picture.
_TEXTS = ("prompt", "negative", "prompt_en", "negative_en")


@dataclass(frozen=True)
class Request:
    """One picture to draw, and the file it becomes."""

    path: Path
    seed: int
    prompt: str
    negative: str = ""
    prompt_en: str = ""
    negative_en: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all pictures of a run have in common; arguments of ``BridgePipeline`` under the same names."""

    model: str
    steps: int
    guidance: float
    sampler: str | None = None
    branch_scale: float = 1.0
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    enlarge: int = 1
    control_images: Mapping[str, Any] | None = None
    approximation: Approximation = field(default=EXACT)


def read_requests(
    file: Path, folder: Path, seed: int, count: int = 1, texts: Mapping[str, str] | None = None
) -> list[Request]:
    """The pictures that a prompt file asks for.

    Args:
        file: UTF-8 text with a native prompt in each line; or, ending in .jsonl, an object in each line with
            ``prompt`` and, where wanted, ``negative``, ``prompt_en``, ``negative_en`` and ``seed``. Empty
            lines count for nothing.
        folder: where the pictures go: ``00000.png`` is the first line's, or ``00000-0.png`` where a line has
            several.
        seed: picture i of the file uses seed + i, unless its line says otherwise.
        count: pictures for each line.
        texts: texts of lines that do not say their own.

    Raises:
        UserError: unreadable file, a line that is no such object, or none at all.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); give a UTF-8 text file with a prompt in each line"
        ) from None
    requests: list[Request] = []
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    for index, (number, line) in enumerate(rows):
        said: dict[str, Any] = (
            _said(line, f"{file}, line {number}") if file.suffix == ".jsonl" else {"prompt": line}
        )
        first = int(said.pop("seed", seed + index * count))
        for i in range(count):
            name = f"{index:05d}.png" if count == 1 else f"{index:05d}-{i}.png"
            requests.append(Request(folder / name, first + i, **{**(texts or {}), **said}))
    if not requests:
        raise UserError(f"{file} holds no prompt; give one in each line")
    return requests


def _said(line: str, where: str) -> dict[str, Any]:
    """A line of a .jsonl file, checked."""
    try:
        said = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where} is not JSON ({error}); give an object such as {{"prompt": "红灯笼"}}'
        ) from None
    if not isinstance(said, dict) or not said.get("prompt"):
        raise UserError(f'{where} has no prompt; give an object such as {{"prompt": "红灯笼"}}')
    for key, value in said.items():
        if key not in (*_TEXTS, "seed"):
            raise UserError(f"{where} says {key!r}; allowed are {', '.join(_TEXTS)} and seed")
        if type(value) is not (int if key == "seed" else str):
            raise UserError(
                f"{where}: {key} is {value!r}; give {'a whole number' if key == 'seed' else 'a text'}"
            )
    return said


def missing(requests: Sequence[Request]) -> list[Request]:
    """The pictures that are not there yet."""
    return [request for request in requests if not request.path.exists()]


def draw_requests(pipe: Any, requests: Sequence[Request], settings: Settings) -> list[Path]:
    """Draw pictures together and write them; returns their files.

    A picture does not depend on which others are drawn with it: its noise is drawn from its own seed on the
        CPU.

    Raises:
        UserError: whatever the pipeline refuses, or a folder that cannot be written.
    """
    pictures = pipe(
        [r.prompt for r in requests],
        [r.negative for r in requests],
        prompt_en=[r.prompt_en for r in requests],
        negative_prompt_en=[r.negative_en for r in requests],
        generator=[torch.Generator().manual_seed(r.seed) for r in requests],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        branch_scale=settings.branch_scale,
        width=settings.width,
        height=settings.height,
        clip_skip=settings.clip_skip,
        control_images=settings.control_images,
        approximation=settings.approximation,
    ).images
    for request, picture in zip(requests, pictures, strict=True):
        facts = describe(
            prompt=request.prompt,
            negative=request.negative,
            prompt_en=request.prompt_en,
            negative_en=request.negative_en,
            seed=request.seed,
            steps=settings.steps,
            guidance=settings.guidance,
            sampler=settings.sampler or type(pipe.scheduler).__name__,
            branch_scale=settings.branch_scale,
            size=picture.size,
            model=settings.model,
            clip_skip=settings.clip_skip,
            plugins=list(pipe.plugins),
        )
        picture = picture.resize((picture.width * settings.enlarge, picture.height * settings.enlarge), 0)
        save_picture(picture, request.path, **picture_info(facts, request.path.suffix))
    return [request.path for request in requests]
