"""``infer`` and ``demo``: prompts -> pictures."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, printable
from ..shipped import shipped
from .draw_options import attention_options, infer_options
from .draw_requests import (
    again_jobs,
    asked_words,
    base_request,
    check_ending,
    check_numbers,
    file_jobs,
    prompt_jobs,
)
from .heavy import importing
from .language import say, told
from .quiet import quiet
from .stages import Stages

if TYPE_CHECKING:
    from ..drawing.jobs import Failure, Job
    from ..drawing.library import Library

#: Endings of files of prompts.
_PROMPT_FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv")
DEFAULT_MODEL = shipped("assets/emoji")

#: The demo's prompts: native concepts, concepts the worlds see differently, and pairs of concept and colour.
DEMO_PROMPTS = (
    "红灯笼，蓝色背景", "红包", "月饼，绿色背景", "饺子", "爆竹，黄色背景", "龙", "筷子，粉色背景", "折扇",
    "苹果，红色背景", "西瓜", "雨伞，紫色背景", "吉他", "向日葵", "狮子，橙色背景", "火箭", "蝴蝶，白色背景",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add ``infer`` and ``demo`` to a parser's commands."""
    infer = commands.add_parser("infer", help="draw pictures for native prompts")
    infer_options(infer)
    attention_options(infer.add_argument_group("which word drew what"))
    infer.set_defaults(run=_infer)

    demo = commands.add_parser(
        "demo", help="draw a labelled grid of Chinese prompts with the shipped weights"
    )
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="picture file (default demo.png)")
    demo.add_argument("--model", default=str(DEFAULT_MODEL), help="pipeline folder or hub name")
    demo.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    demo.add_argument("--steps", type=int, default=20, help="of each picture (default 20)")
    demo.set_defaults(run=_demo)


def _infer(options: argparse.Namespace) -> None:
    check_numbers(options)
    _check_sources(options)
    if options.grid is not None:
        check_ending(options.grid, "--grid")
    stages = Stages()
    with importing():
        import_module("bdm.drawing.painter")

    quiet()
    stages.end("imports")
    from ..drawing.library import Library

    beside = [path.parent for path in options.pictures] or [Path()]
    library = Library(options.models, beside)
    failed: list[Failure] = []
    if options.pictures:
        jobs = again_jobs(options, library)
    elif options.prompts is not None:
        jobs = file_jobs(options, base_request(options, library), failed)
    else:
        jobs = prompt_jobs(options, base_request(options, library))
    words = asked_words(options)
    jobs = _complete(options, [replace(job, words=words) for job in jobs], library, failed)
    if options.prompts is not None:
        _draw_file(options, jobs, failed)
    else:
        _draw_prompts(options, jobs, stages)


def _check_sources(options: argparse.Namespace) -> None:
    if options.stages and options.prompts is not None:
        raise UserError("--stages times one drawing; give prompts on the command line instead of --prompts")
    _refuse_files(options.prompt)
    if options.pictures and options.prompts is not None:
        raise UserError("--from and --prompts are both given; give one of them")
    if not options.pictures and bool(options.prompt) == (options.prompts is not None):
        raise UserError(
            "give prompts or --prompts FILE"
            + (", not both" if options.prompt else ', such as "红灯笼，蓝色背景"')
        )


def _refuse_files(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if Path(prompt).suffix.lower() in _PROMPT_FILES and os.path.isfile(prompt):
            raise UserError(f"the prompt {printable(prompt, 120)} is a file; give it with --prompts")


def _complete(
    options: argparse.Namespace, jobs: list[Job], library: Library, failed: list[Failure]
) -> list[Job]:
    """The jobs with all files found; those of rows that lack one are noted, others are an error."""
    from ..drawing.complete import complete
    from ..drawing.jobs import Failure, describe
    from ..drawing.painter import choose_device, usual_precision

    precision = usual_precision(choose_device(options.device))
    found: list[Job] = []
    for job in jobs:
        try:
            found.append(replace(job, request=complete(job.request, library, precision)))
        except UserError as error:
            if not job.where:
                raise
            failed.append(Failure(describe(job), f"cannot be drawn: {error}"))
    _mention_words(found)
    return found


def _mention_words(jobs: list[Job]) -> None:
    from ..drawing.trigger_words import lacking

    for name, words in lacking(job.request for job in jobs).items():
        logging.warning(
            "%s acts through the English prompt; --prompt-en (or --negative-en) holds none of its words: %s",
            name,
            ", ".join(words[:10]),
        )


def _draw_prompts(options: argparse.Namespace, jobs: list[Job], stages: Stages) -> None:
    """Draw the prompts of the command line, or pictures again."""
    from ..drawing.jobs import Todo, parts, refuse_failures
    from ..drawing.painter import Painter

    todo = Todo.of(jobs, options.redraw)
    failed: list[Failure] = []
    if todo.waiting:
        painter = Painter(options.device, stages.end, bars=len(jobs) <= options.batch)
        if options.pictures:
            _mention_versions(todo.waiting, painter)
        if len(jobs) == 1:
            painter.draw_and_save(jobs)
        else:
            for part in parts(todo.waiting, options.batch):
                painter.run(part)
        failed = painter.take_failures()
    names = {failure.what for failure in failed}
    for job in jobs:
        if str(job.path) not in names:
            print(*map(printable, (job.path, *([job.strip] if job.words is not None else []))), sep="\n")
    counts = todo.counts(failed)
    if len(jobs) > 1 or not counts.drawn:
        say(str(counts))
    _draw_grid(options, jobs)
    if options.stages:
        stages.show()
    refuse_failures(failed, counts.pictures)


def _draw_grid(options: argparse.Namespace, jobs: list[Job]) -> None:
    """Write the contact sheet that is asked for, of the pictures that are there."""
    from ..drawing.grid import save_picture
    from ..drawing.jobs import state
    from ..drawing.sheets import contact_sheet
    from ..plugins.control_images import open_picture

    if options.grid is None:
        return
    there = [job for job in jobs if state(job) == "there"]
    if there:
        pictures = [open_picture(job.path) for job in there]
        save_picture(contact_sheet([job.request for job in there], pictures), options.grid)
        print(printable(options.grid))


def _mention_versions(jobs: Any, painter: Any) -> None:
    """Say where the last bits of a picture may come out otherwise than in the one it is drawn from."""
    from dataclasses import asdict

    for job in jobs:
        there, here = asdict(job.request.versions), asdict(painter.versions(1))
        other = [f"{name} {there[name]}, here {here[name]}" for name in there if there[name] != here[name]]
        if other:
            logging.warning("the last bits may differ: the picture was drawn with %s", "; ".join(other))


def _draw_file(options: argparse.Namespace, jobs: list[Job], failed: list[Failure]) -> None:
    """Draw the rows of a prompt file that are not drawn yet, then name those that gave no picture."""
    from ..drawing.jobs import Todo, parts, refuse_failures

    todo = Todo.of(jobs, options.redraw)
    waiting = parts(todo.waiting, options.batch)
    draw = _draw_on_ray if options.engine == "ray" else _draw_in_processes
    undrawn = draw(options, waiting)
    if undrawn is None:  # this process is not the one that tells
        return
    counts = todo.counts([*failed, *undrawn])
    say(f"{counts.pictures} pictures in {printable(options.out)}: {counts}")
    _draw_grid(options, jobs)
    refuse_failures([*failed, *undrawn], counts.pictures)


def _draw_on_ray(options: argparse.Namespace, parts: list[list[Any]]) -> list[Any]:
    from ..drawing.painter import Painter
    from ..parallel.ray import run_on_ray

    return run_on_ray(Painter, (options.device,), parts, sum(map(len, parts)), "drawing")


def _draw_in_processes(options: argparse.Namespace, parts: list[list[Any]]) -> list[Any] | None:
    """Draw this process's share; returns what all together could not draw, or None in all but the first."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from ..drawing.painter import Painter
    from ..parallel.processes import cpu_only

    state = PartialState(cpu=cpu_only())
    # All know what is missing before the first picture is written.
    state.wait_for_everyone()
    ours = parts[state.process_index :: state.num_processes]
    failures: list[Any] = []
    with tqdm(
        total=sum(map(len, ours)),
        desc=told("drawing"),
        unit=told("picture"),
        disable=not state.is_main_process,
    ) as bar:
        painter = Painter(options.device) if ours else None
        for part in ours:
            assert painter is not None
            bar.update(painter.run(part))
            failures += painter.take_failures()
    everyone = gather_object(failures)
    return everyone if state.is_main_process else None


def _demo(options: argparse.Namespace) -> None:
    with importing():
        from ..drawing.complete import default_guidance
        from ..drawing.grid import labelled_grid, save_picture
        from ..pipeline import BridgePipeline

    quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    guidance = default_guidance(options.model)
    pictures = pipe(
        list(DEMO_PROMPTS), seed=options.seed, num_inference_steps=options.steps, guidance_scale=guidance
    ).images
    save_picture(labelled_grid(pictures, list(DEMO_PROMPTS), columns=8, scale=4), options.out)
    print(printable(options.out.resolve()))
