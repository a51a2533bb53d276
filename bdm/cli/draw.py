"""``infer`` and ``demo``: prompts -> pictures."""

from __future__ import annotations

import argparse
import math
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, printable
from .draw_options import infer_options
from .heavy import importing
from .painter import DEFAULT_MODEL, Painter, default_guidance, settled_approximation
from .quiet import quiet

#: The demo's prompts: native concepts, concepts the worlds see differently, and pairs of concept and colour.
DEMO_PROMPTS = (
    "红灯笼，蓝色背景", "红包", "月饼，绿色背景", "饺子", "爆竹，黄色背景", "龙", "筷子，粉色背景", "折扇",
    "苹果，红色背景", "西瓜", "雨伞，紫色背景", "吉他", "向日葵", "狮子，橙色背景", "火箭", "蝴蝶，白色背景",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add ``infer`` and ``demo`` to a parser's commands."""
    infer = commands.add_parser("infer", help="draw pictures for native prompts")
    infer_options(infer)
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
    _check_numbers(options)
    if options.stages and options.prompts is not None:
        raise UserError("--stages times one drawing; give prompts on the command line instead of --prompts")
    if bool(options.prompt) == (options.prompts is not None):
        raise UserError(
            "give prompts or --prompts FILE"
            + (", not both" if options.prompt else ', such as "红灯笼，蓝色背景"')
        )
    with importing():
        import_module("bdm.pipeline")

    settled_approximation(options)
    if options.sampler:
        from ..models.samplers import make_scheduler

        make_scheduler(options.sampler)  # an unknown name is refused before anything heavy
    if options.prompts is None:
        _draw_prompts(options)
    else:
        _draw_file(options)


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, before anything heavy."""
    if min(options.steps, options.count, options.enlarge, options.batch) < 1:
        raise UserError(
            f"--steps {options.steps}, --count {options.count}, --enlarge {options.enlarge}, --batch"
            f" {options.batch}: each must be at least 1"
        )
    for name in ("guidance", "english_guidance", "branch_scale"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a finite number")


def _draw_prompts(options: argparse.Namespace) -> None:
    """Draw the prompts of the command line."""
    requests = _requests(options)
    painter = Painter(options)
    for path in painter.draw(requests):
        print(printable(path))
    if options.stages:
        painter.stages.show()


def _draw_file(options: argparse.Namespace) -> None:
    """Draw the lines of a prompt file that are not drawn yet, then name those that gave no picture."""
    from ..drawing.requests import Failure, missing, read_requests, refuse_failures

    options.out = options.out or Path("pictures")
    if os.path.isfile(options.out):
        raise UserError(f"--out {options.out} is a file; with --prompts it is the folder of the pictures")
    _refuse_unusable(options.out)
    failed: list[Failure] = []
    requests = read_requests(
        options.prompts, options.out, options.seed, options.count, _texts(options), failed
    )
    waiting = missing(requests)
    parts = [waiting[start : start + options.batch] for start in range(0, len(waiting), options.batch)]
    draw = _draw_on_ray if options.engine == "ray" else _draw_in_processes
    undrawn = draw(options, parts)
    if undrawn is None:  # this process is not the one that tells
        return
    pictures = len(requests) - len(missing(requests))
    print(f"{pictures} pictures in {printable(options.out)}")
    refuse_failures([*failed, *undrawn], pictures)


def _draw_on_ray(options: argparse.Namespace, parts: list[list[Any]]) -> list[Any]:
    from ..parallel.ray import run_on_ray

    return run_on_ray(Painter, (options,), parts, sum(map(len, parts)), "drawing")


def _draw_in_processes(options: argparse.Namespace, parts: list[list[Any]]) -> list[Any] | None:
    """Draw this process's share; returns what all together could not draw, or None in all but the first."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from ..parallel.processes import cpu_only

    state = PartialState(cpu=cpu_only())
    # All know what is missing before the first picture is written.
    state.wait_for_everyone()
    ours = parts[state.process_index :: state.num_processes]
    failures: list[Any] = []
    with tqdm(
        total=sum(map(len, ours)), desc="drawing", unit="picture", disable=not state.is_main_process
    ) as bar:
        painter = Painter(options) if ours else None
        for part in ours:
            assert painter is not None
            bar.update(painter.run(part))
            failures += painter.take_failures()
    everyone = gather_object(failures)
    return everyone if state.is_main_process else None


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """What all pictures of a command are told beside their prompts."""
    return {"negative": options.negative, "prompt_en": options.prompt_en, "negative_en": options.negative_en}


def _requests(options: argparse.Namespace) -> list[Any]:
    """The pictures that the prompts of the command line ask for."""
    from ..drawing.requests import Request
    from ..pipeline.groups import as_seed
    from ..text.chunks import refuse_half_characters

    out = options.out or Path("out.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: allowed endings are .png, .jpg and .webp")
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    for text in (*options.prompt, *_texts(options).values()):
        refuse_half_characters(text)
    paths = [out] if len(prompts) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(prompts))]
    for path in paths:
        _refuse_unusable(path)
    texts: dict[str, Any] = _texts(options)
    return [
        Request(path, as_seed(options.seed + i), prompt, **texts)
        for i, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
    ]


def _refuse_unusable(out: Path) -> None:
    """Refuse a path that no file can have, before anything is drawn for it."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--out {str(out)[:120]}: {reason}; choose another file") from None


def _demo(options: argparse.Namespace) -> None:
    with importing():
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
