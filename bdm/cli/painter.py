"""Draws what the options of ``infer`` ask for, in one process."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..shipped import find_path, shipped
from .draw_plugins import attach_plugins
from .heavy import importing
from .quiet import quiet
from .stages import Stages

DEFAULT_MODEL = shipped("assets/emoji")
#: Its guidance scale, chosen by the sweep of configs/emoji/evaluate.yaml.
SHIPPED_GUIDANCE = 2.0


class Painter:
    """Draws what an ``infer`` command asks for, in one process, with its model and plug-ins.

    Args:
        options: the command's; where they name no device, accelerate chooses the best there is.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.stages = Stages()
        with importing():
            import_module("bdm.pipeline")
            from ..drawing.requests import Settings

        quiet()
        self.stages.end("imports")
        self.pipe = _pipeline(options)
        control_images = attach_plugins(self.pipe, options)
        guidance = default_guidance(options.model) if options.guidance is None else options.guidance
        self.settings = Settings(
            model=str(options.model),
            steps=options.steps,
            guidance=guidance,
            english_guidance=options.english_guidance,
            sampler=options.sampler,
            branch_scale=options.branch_scale,
            width=options.width,
            height=options.height,
            clip_skip=options.clip_skip,
            enlarge=options.enlarge,
            control_images=control_images,
            approximation=settled_approximation(options),
        )
        self._parts = 0
        self._drawn = 0
        self._failures: list[Any] = []
        self.stages.end("model")

    def draw(self, requests: list[Any]) -> list[Path]:
        """Draw pictures together, with the pipeline's own bar; returns their files."""
        from ..drawing.requests import draw_requests

        try:
            paths = draw_requests(self.pipe, requests, self.settings)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise UserError(
                f"too little memory ({first_line(error)}); draw smaller pictures, or fewer at once"
            ) from None
        self.stages.end("pictures")
        return paths

    def run(self, requests: list[Any]) -> int:
        """Draw one of many parts of a file; returns how many pictures were asked for.

        Those that cannot be drawn are kept for ``take_failures``.

        Raises:
            UserError: nothing can be drawn, whatever the line.
        """
        from ..drawing.requests import draw_each, refuse_common_failure

        self._parts += 1
        self.pipe.set_progress_bar_config(disable=True)
        # It takes a step of its own, so two parts gain nothing; on a GPU it compiles, for longer than many
        # files take.
        if self._parts == 3 and self.pipe.device.type == "cpu":
            self.pipe.optimize(height=self.settings.height, width=self.settings.width, count=len(requests))
        failed = draw_each(self.draw, requests)
        if not self._drawn:
            refuse_common_failure(failed, requests)
        self._drawn += len(requests) - len(failed)
        self._failures += failed
        return len(requests)

    def take_failures(self) -> list[Any]:
        """What could not be drawn since this was asked last."""
        failures, self._failures = self._failures, []
        return failures


def settled_approximation(options: argparse.Namespace) -> Any:
    """What the options leave out of the work."""
    from ..speed.approximate import Approximation

    return Approximation(*_interval(options.guidance_interval), options.branch_every, options.deep_every)


def _interval(text: str) -> tuple[float, float]:
    try:
        start, end = map(float, text.split(":"))
    except ValueError:
        raise UserError(
            f"--guidance-interval {text}: give two shares of the steps, such as 0.1:0.8"
        ) from None
    return start, end


def _pipeline(options: argparse.Namespace) -> Any:
    """The pipeline on its device, with the sampler that was asked for."""
    import torch
    from accelerate import PartialState

    from ..formats.weights import DTYPES
    from ..models.samplers import other_sampler
    from ..parallel.processes import cpu_only
    from ..pipeline import BridgePipeline

    try:
        device = torch.device(options.device or PartialState(cpu=cpu_only()).device or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {options.device} cannot be used ({first_line(error)}); leave it out, or give cpu"
        ) from None
    name = options.dtype or ("fp16" if device.type == "cuda" else "fp32")
    pipe = BridgePipeline.from_pretrained(
        options.model, torch_dtype=DTYPES[name], english=_needs_english(options)
    ).to(device)
    if options.sampler:
        pipe.scheduler = other_sampler(options.sampler, pipe.scheduler)
    return pipe


def _needs_english(options: argparse.Namespace) -> bool:
    """Whether the English text encoder has more to say than what "" means to it."""
    texts = options.prompts is not None or options.prompt_en or options.negative_en or options.clip_skip != 1
    return bool(texts or options.checkpoint or options.lora or options.embedding or options.controlnet)


def default_guidance(model: str) -> float:
    """Guidance scale of the shipped model, however its path is written, or Stable Diffusion's usual one."""
    return SHIPPED_GUIDANCE if find_path(model).resolve() == DEFAULT_MODEL.resolve() else 7.5
