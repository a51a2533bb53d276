"""Draws requests in one process, and keeps its model and plug-ins from one to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, first_line
from ..formats.weights import DTYPES
from ..models.samplers import other_sampler
from ..parallel.processes import cpu_only
from ..pipeline import BridgePipeline
from ..pipeline.attention import record_attention
from ..pipeline.onlooker import Look, Onlooker
from .attached import attach, needs_english, shown_picture
from .attention_strip import recorded_strip
from .beside import other_branch, put_branches, told_beside
from .grid import save_picture
from .jobs import Failure, Job, draw_each, refuse_common_failure
from .modes import MODES
from .picture_info import picture_info
from .request import BranchUse, FileRef, PluginUse, Request, Versions
from .samplers import put_sampler, scheduler_names
from .strip_file import strip_info

NONE_DRAWN = (
    "{} came out as NaN; use a smaller guidance or branch scale, smaller strengths and weights in brackets,"
    " or more precision (fp32)"
)
#: So many rows that fail of the same, before one is drawn, are no row's fault.
_ENOUGH_FAILURES = 8


@dataclass(frozen=True)
class Drawn:
    """A picture, and what it was drawn by.

    Attributes:
        image: the picture, enlarged as was asked for.
        request: complete, with the versions that drew it.
        sampler: A1111's names of sampler and schedule.
    """

    image: Image.Image
    request: Request
    sampler: tuple[str, str] = ("", "")

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all, with how it was made; the ending says how (.png, .jpg, .webp)."""
        info = picture_info(self.request, Path(path).suffix, self.image.size, *self.sampler)
        save_picture(self.image, Path(path), **info)
        return Path(path)


def choose_device(name: str | None) -> torch.device:
    """A device by name, or the best there is.

    Raises:
        UserError: it cannot be used.
    """
    from accelerate import PartialState

    try:
        device = torch.device(name or PartialState(cpu=cpu_only()).device or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used ({first_line(error)}); leave it out, or give cpu"
        ) from None
    return device


def usual_precision(device: torch.device) -> str:
    """What networks compute in on a device where nothing else is said."""
    return "fp16" if device.type == "cuda" else "fp32"


class Painter:
    """Draws complete requests (see ``bdm.drawing.complete``).

    Args:
        device: by name; None for the best there is.
        on_stage: is told when a stage ends: "model", "pictures".
        bars: whether each call of the pipeline shows its own progress.
        given: a request's model and precision, and the pipeline that is to draw it, where it is loaded.
        english: load the English text encoder whether or not anything is said in English.
    """

    def __init__(
        self,
        device: str | None = None,
        on_stage: Callable[[str], None] = lambda name: None,
        bars: bool = False,
        given: tuple[FileRef, str, Any] | None = None,
        english: bool = False,
    ) -> None:
        self._device, self._on_stage, self._bars = choose_device(device), on_stage, bars
        self._english = english
        self._pipe: Any = None if given is None else given[2]
        self._scheduler: Any = None if given is None else given[2].scheduler
        self._model: Any = None if given is None else (given[0], None, given[1])
        self._plugins: tuple[PluginUse, ...] = ()
        self._conditions: dict[str, Image.Image] = {}
        self._stack = ExitStack()
        self._beside: tuple[FileRef, ...] = ()
        self._parts, self._written = 0, set[Path]()
        self._failures: list[Failure] = []
        self._fruitless: list[Failure] | None = []  # until the first picture is drawn

    def draw(self, requests: Sequence[Request], look: Look | None = None) -> list[Drawn | None]:
        """Draw pictures together; they differ in texts and seeds alone.

        A picture does not depend on which others are drawn with it, but for how sums are rounded: its noise
        is drawn from its own seed on the CPU.

        Args:
            requests: of the pictures.
            look: is shown the latents of each step.

        Returns:
            A picture for each request; None for one that is none (NaN).

        Raises:
            UserError: whatever the pipeline refuses.
        """
        english = self._english or any(needs_english(request) for request in requests)
        self._prepare(requests[0], english)
        images = draw_images(self._pipe, requests, self._conditions, look)
        versions = self.versions(len(requests))
        names = scheduler_names(self._pipe.scheduler)
        self._on_stage("pictures")
        return [
            finished(self._pipe, image, replace(request, versions=versions), names)
            for request, image in zip(requests, images, strict=True)
        ]

    def versions(self, together: int) -> Versions:
        packages = [version(name) for name in ("torch", "diffusers", "transformers")]
        own = import_module("bdm").__version__
        cuda = self._device.type == "cuda"
        device = torch.cuda.get_device_name(self._device) if cuda else self._device.type
        return Versions(own, *packages, device=device, together=together)

    def _prepare(self, request: Request, english: bool) -> None:
        """Have the model, plug-ins and sampler of a request in place."""
        assert request.model is not None
        assert request.precision is not None
        has_english = self._pipe is not None and self._pipe.text_encoder is not None
        model = (request.model, request.branch, request.precision)
        if model != self._model or (english and not has_english):
            self._stack.close()
            self._pipe, self._model, self._plugins, self._conditions = None, None, (), {}
            self._beside = ()
            self._pipe = BridgePipeline.from_pretrained(
                str(request.model.source),
                torch_dtype=DTYPES[request.precision],
                english=english,
                **other_branch(request),
            ).to(self._device)
            self._scheduler = self._pipe.scheduler
            self._model = model
        if request.plugins != self._plugins:
            self._attach(request.plugins)
        self._put_beside(request.beside)
        put_sampler(self._pipe, self._scheduler, request.sampler, request.schedule)
        assert self._pipe is not None
        self._pipe.set_progress_bar_config(disable=not self._bars)
        self._on_stage("model")

    def _attach(self, plugins: tuple[PluginUse, ...]) -> None:
        """Attach plug-ins in place of those that are there; none are where one of them cannot be."""
        self._detach()
        try:
            self._conditions = attach(self._pipe, plugins, self._stack)
        except BaseException:
            self._detach()
            raise
        self._plugins = plugins

    def _detach(self) -> None:
        self._stack.close()
        self._pipe.plugins.clear()
        self._plugins, self._conditions = (), {}

    def _put_beside(self, uses: tuple[BranchUse, ...]) -> None:
        files = tuple(use.file for use in uses)
        if files != self._beside:
            self._beside = ()
            put_branches(self._pipe, uses)
            self._beside = files

    def draw_and_save(self, jobs: Sequence[Job]) -> None:
        """Draw pictures together and write those that are some.

        Raises:
            UserError: one is none; whatever the pipeline refuses; a folder that cannot be written.
        """
        if jobs[0].words is not None:
            for job in jobs:
                self._draw_with_strip(job, job.words or ())
            return
        drawn = self.draw([job.request for job in jobs])
        for job, picture in zip(jobs, drawn, strict=True):
            if picture is not None:
                picture.save(job.path)
                self._written.add(job.path)
        none = [job for job, picture in zip(jobs, drawn, strict=True) if picture is None]
        if none:
            raise UserError(NONE_DRAWN.format(f"the picture for {none[0].request.prompt[:60]!r}"))

    def draw_with_strip(self, request: Request, words: Sequence[str] = ()) -> tuple[Drawn, Image.Image]:
        """Draw a request, and the strip of what its words looked at; the picture is what it is without.

        Args:
            request: complete.
            words: see ``bdm.drawing.attention_strip.recorded_strip``.

        Raises:
            UserError: a word that is in no prompt, prompts that change from step to step, a picture that is
                none.
        """
        pipe = self.pipeline(request)
        with record_attention(pipe) as found:
            (drawn,) = self.draw([request])
        if drawn is None:
            raise UserError(NONE_DRAWN.format(f"the picture for {request.prompt[:60]!r}"))
        return drawn, recorded_strip(found, drawn.image, request, words)

    def _draw_with_strip(self, job: Job, words: Sequence[str]) -> None:
        drawn, strip = self.draw_with_strip(job.request, words)
        drawn.save(job.path)
        self._written.add(job.path)
        save_picture(strip, job.strip, **strip_info(drawn.request, words))

    def run(self, jobs: Sequence[Job]) -> int:
        """Draw one of many parts of the work, and write it; returns how many pictures were asked for.

        Those that cannot be drawn are kept for ``take_failures``.

        Raises:
            UserError: nothing can be drawn, whatever the row.
        """
        self._parts += 1
        # It takes a step of its own, so two parts gain nothing; on a GPU it compiles, for longer than many
        # files take. It changes how sums are rounded, so pictures that are drawn alone go without.
        if self._parts == 3 and len(jobs) > 1 and self._device.type == "cpu" and self._pipe is not None:
            first = jobs[0].request
            self._pipe.optimize(height=first.height, width=first.width, count=len(jobs))
        failed = draw_each(self.draw_and_save, jobs, lambda job: job.path in self._written)
        self._failures += failed
        if self._fruitless is not None:
            self._fruitless += failed
            if len(failed) < len(jobs):
                self._fruitless = None
            elif len(self._fruitless) >= _ENOUGH_FAILURES:
                refuse_common_failure(self._fruitless)
        return len(jobs)

    def take_failures(self) -> list[Failure]:
        """What could not be drawn since this was asked last."""
        failures, self._failures = self._failures, []
        return failures

    def pipeline(self, request: Request) -> Any:
        """The pipeline that draws a complete request, with its plug-ins and sampler in place."""
        self._prepare(request, self._english or needs_english(request))
        return self._pipe

    def sampler(self, request: Request) -> Any:
        """A scheduler of a request's own, whose model is in place."""
        if request.sampler:
            return other_sampler(request.sampler, self._scheduler, request.schedule or None)
        return copy.deepcopy(self._scheduler)


def draw_images(
    pipe: Any,
    requests: Sequence[Request],
    conditions: Mapping[str, Image.Image],
    look: Look | None = None,
    share: bool = True,
) -> Any:
    """Pictures (N, 3, H, W) in [0, 1] that a pipeline draws for requests; see ``Painter.draw``.

    Args:
        pipe: with the plug-ins and the sampler of the requests.
        requests: that differ in texts and seeds alone.
        conditions: of the ControlNets, by name.
        look: is shown the latents of each step.
        share: whether the pipeline saves work itself.

    Raises:
        UserError: whatever the pipeline refuses.
    """
    mode = requests[0].mode
    files = {role: Path(str(file.source)) for role, file in mode.pictures}
    call = _call(requests) | {"control_images": conditions or None, "share": share}
    if look is not None:
        call["callback_on_step_end"] = Onlooker(look)
    try:
        return MODES[mode.name].draw(pipe, call, files, dict(mode.settings)).images
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(
            f"too little memory ({first_line(error)}); draw smaller pictures, or fewer at once"
        ) from None


def _call(requests: Sequence[Request]) -> dict[str, Any]:
    """The arguments of the pipeline's call."""
    first = requests[0]
    return dict(
        prompt=[request.prompt for request in requests],
        negative_prompt=[request.negative for request in requests],
        prompt_en=[request.prompt_en for request in requests],
        negative_prompt_en=[request.negative_en for request in requests],
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        english_guidance=first.english_guidance,
        branch_scale=first.branch_scale,
        branch_start=first.branch_start,
        branch_end=first.branch_end,
        branch_schedule=first.branch_schedule or None,
        world=first.world,
        beside=told_beside(requests),
        prompt_rules=first.rules,
        width=first.width,
        height=first.height,
        clip_skip=first.clip_skip,
        approximation=first.approximation,
        output_type="pt",
        **shown_picture(first.plugins),
    )


def finished(pipe: Any, image: Tensor, request: Request, names: tuple[str, str]) -> Drawn | None:
    """A picture out of (3, H, W) in [0, 1]; None for one that is none (NaN)."""
    if not image.isfinite().all():
        return None
    processor = pipe.image_processor
    (picture,) = processor.numpy_to_pil(processor.pt_to_numpy(image[None]))
    size = (picture.width * request.enlarge, picture.height * request.enlarge)
    return Drawn(picture.resize(size, Image.Resampling.NEAREST), request, names)
