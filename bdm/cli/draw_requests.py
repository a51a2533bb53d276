"""The requests that the options of ``infer`` ask for, and the files they become."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line
from .draw_beside import named_beside
from .draw_from import said_by
from .draw_modes import named_mode, named_rules
from .draw_plugins import named_plugins

if TYPE_CHECKING:
    from ..drawing.jobs import Failure, Job
    from ..drawing.library import Library
    from ..drawing.request import Request

#: Options that are fields of a request under their own names.
_FIELDS = (
    "negative", "prompt_en", "negative_en", "seed", "steps", "guidance", "english_guidance", "sampler",
    "branch_scale", "branch_schedule", "world", "width", "height", "enlarge", "clip_skip",
)  # fmt: skip


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, before anything heavy.

    Raises:
        UserError: names them.
    """
    numbers = {name: getattr(options, name) for name in ("steps", "count", "enlarge", "batch")}
    if any(number is not None and number < 1 for number in numbers.values()):
        said = ", ".join(f"--{name} {number}" for name, number in numbers.items() if number is not None)
        raise UserError(f"{said}: each must be at least 1")
    for name in ("guidance", "english_guidance", "branch_scale"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a finite number")


def base_request(options: argparse.Namespace, library: Library, base: Request | None = None) -> Request:
    """What all pictures of a command have in common.

    Args:
        options: the command's.
        library: where files are looked for.
        base: what is asked for where the options say nothing; a request's defaults if it is left out.

    Raises:
        UserError: names a file, a sampler or numbers that cannot be.
    """
    from ..drawing.request import FileRef, Request
    from ..drawing.samplers import named

    base = base or Request()
    said: dict[str, Any] = {name: getattr(options, name) for name in _FIELDS}
    said = {name: value for name, value in said.items() if value is not None}
    if "sampler" in said or options.schedule is not None:  # an unknown name is refused before anything heavy
        sampler, schedule = said.get("sampler", base.sampler), options.schedule or ""
        said["sampler"], said["schedule"] = named(sampler, schedule)
    if options.model is not None:
        said["model"] = FileRef.to(library.find(options.model, "checkpoint"))
    if options.branch is not None:
        said["branch"] = FileRef.to(library.find(options.branch, "branch"))
    if options.dtype is not None:
        said["precision"] = options.dtype
    said["mode"] = named_mode(options, library, base.mode)
    said["rules"] = named_rules(options, base.rules)
    said["beside"] = named_beside(options, library, base.beside)
    plugins = (*base.plugins, *named_plugins(options, library))
    return replace(base, plugins=plugins, approximation=_approximation(options, base.approximation), **said)


def _approximation(options: argparse.Namespace, base: Any) -> Any:
    said: dict[str, Any] = {"branch_every": options.branch_every, "deep_every": options.deep_every}
    if options.guidance_interval is not None:
        said["guidance_start"], said["guidance_end"] = _interval(options.guidance_interval)
    return replace(base, **{name: value for name, value in said.items() if value is not None})


def _interval(text: str) -> tuple[float, float]:
    try:
        start, end = map(float, text.split(":"))
    except ValueError:
        raise UserError(
            f"--guidance-interval {text}: give two shares of the steps, such as 0.1:0.8"
        ) from None
    return start, end


def asked_words(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The words whose attention is shown, () for the usual ones; None for no strips.

    Raises:
        UserError: words that are none, or several pictures at once.
    """
    if not options.attention and options.attention_words is None:
        return None
    if options.batch != 1:
        raise UserError("--attention records one picture at a time; leave --batch out")
    if options.attention_words is None:
        return ()
    words = [word.strip() for word in re.split("[,，、]", options.attention_words)]
    if not any(words):
        raise UserError("--attention-words names no word; give some, such as --attention-words 红灯笼,蓝色")
    return tuple(dict.fromkeys(filter(None, words)))


def prompt_jobs(options: argparse.Namespace, base: Request) -> list[Job]:
    """The pictures of the prompts on the command line.

    Raises:
        UserError: a file that cannot be written, a seed that is none, a text that is none.
    """
    from ..drawing.chosen import with_chosen
    from ..drawing.jobs import Job
    from ..drawing.picture_names import apart, check_pattern, picture_name

    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    requests = [replace(base, prompt=prompt, seed=base.seed + i) for i, prompt in enumerate(prompts)]
    requests = [with_chosen(request, _wildcards(options)) for request in requests]
    if options.names:
        folder = options.out or Path("pictures")
        check_pattern(options.names)
        refuse_unusable(folder)
        names = apart(picture_name(options.names, request, i) for i, request in enumerate(requests))
        return [Job(folder / name, request) for name, request in zip(names, requests, strict=True)]
    paths = numbered(options.out or Path("out.png"), len(prompts))
    return [Job(path, request) for path, request in zip(paths, requests, strict=True)]


def _wildcards(options: argparse.Namespace) -> Any:
    from ..text.wildcards import NO_WILDCARDS, Wildcards

    return NO_WILDCARDS if options.wildcards is None else Wildcards.of(options.wildcards)


def numbered(out: Path, count: int) -> list[Path]:
    """The files of so many pictures: one as it is named, several with numbers.

    Raises:
        UserError: no picture's ending, or no name that a file can have.
    """
    check_ending(out)
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(count)]
    for path in paths:
        refuse_unusable(path)
    return paths


def check_ending(out: Path, option: str = "--out") -> None:
    """Refuse a file that is none of a picture's.

    Raises:
        UserError: names the endings that are.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{option} {out}: allowed endings are .png, .jpg and .webp")


def refuse_unusable(out: Path) -> None:
    """Refuse a path that no file can have, before anything is drawn for it."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--out {str(out)[:120]}: {reason}; choose another file") from None


def file_jobs(options: argparse.Namespace, base: Request, failed: list[Failure]) -> list[Job]:
    """The pictures of a prompt file; rows that cannot be read are noted.

    Raises:
        UserError: the file cannot be read, or the folder is none.
    """
    from ..drawing.prompt_file import BDM870, read_prompt_file
    from ..drawing.row_jobs import row_jobs

    options.out = options.out or Path("pictures")
    if os.path.isfile(options.out):
        raise UserError(f"--out {options.out} is a file; with --prompts it is the folder of the pictures")
    refuse_unusable(options.out)
    if options.translations:
        logging.warning(
            "--translations: the branch was trained beside an empty English prompt; beside an English text"
            " things come out right less often, and seldom as in the native world"
        )
    rows = read_prompt_file(options.prompts, BDM870(options.long_prompts, options.translations))
    jobs, wrong = row_jobs(rows, base, options.out, options.names, options.count, _wildcards(options))
    failed += wrong
    return jobs


def again_jobs(options: argparse.Namespace, library: Library) -> list[Job]:
    """The pictures that pictures ask for.

    Raises:
        UserError: one carries no request.
    """
    from ..drawing.jobs import Job

    if len(options.prompt) > 1:
        raise UserError(f"--from and {len(options.prompt)} prompts are given; give one prompt at most")
    requests = [base_request(options, library, said_by(path, options, library)) for path in options.pictures]
    if options.prompt:
        requests = [replace(request, prompt=options.prompt[0]) for request in requests]
    if options.out is None:
        paths = [Path(f"{path.stem}-again{path.suffix}") for path in options.pictures]
        for path in paths:
            check_ending(path)
    else:
        paths = numbered(options.out, len(requests))
    return [Job(path, request) for path, request in zip(paths, requests, strict=True)]
