"""``infer`` and ``demo``: prompts -> pictures."""

from __future__ import annotations

import argparse
import logging
import math
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, printable
from ..shipped import find_path, shipped
from .heavy import importing
from .quiet import quiet
from .stages import Stages

DEFAULT_MODEL = shipped("assets/emoji")
#: Its guidance scale, chosen by the sweep of configs/emoji/evaluate.yaml.
SHIPPED_GUIDANCE = 2.0

#: The demo's prompts: native concepts, concepts the worlds see differently, and pairs of concept and colour.
DEMO_PROMPTS = (
    "红灯笼，蓝色背景", "红包", "月饼，绿色背景", "饺子", "爆竹，黄色背景", "龙", "筷子，粉色背景", "折扇",
    "苹果，红色背景", "西瓜", "雨伞，紫色背景", "吉他", "向日葵", "狮子，橙色背景", "火箭", "蝴蝶，白色背景",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add ``infer`` and ``demo`` to a parser's commands."""
    infer = commands.add_parser("infer", help="draw pictures for native prompts")
    _infer_options(infer)
    infer.set_defaults(run=_infer)

    demo = commands.add_parser(
        "demo", help="draw a labelled grid of Chinese prompts with the shipped weights"
    )
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="picture file (default demo.png)")
    demo.add_argument("--model", default=str(DEFAULT_MODEL), help="pipeline folder or hub name")
    demo.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    demo.add_argument("--steps", type=int, default=20, help="of each picture (default 20)")
    demo.set_defaults(run=_demo)


def _infer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help='native prompts, such as "红灯笼，蓝色背景"')
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "a native prompt in each line, or .jsonl with prompt, negative, prompt_en, negative_en, seed;"
            " under accelerate launch the processes share them, and pictures that are there are not drawn"
            " again"
        ),
    )
    parser.add_argument(
        "--engine",
        choices=("accelerate", "ray"),
        default="accelerate",
        help="who shares out the lines of a --prompts file",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="pictures of a --prompts file that are drawn at once (default 8)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help=(
            "picture file, numbered if there are several (default out.png); a folder with --prompts (default"
            " pictures)"
        ),
    )
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        help="pipeline folder or hub name (default: the shipped emoji model)",
    )
    parser.add_argument("--negative", default="", help="native negative prompt")
    parser.add_argument("--prompt-en", default="", help='English prompt of the backbone (default "")')
    parser.add_argument("--negative-en", default="", help="English negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    parser.add_argument("--steps", type=int, default=30, help="of each picture (default 30)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="guidance scale (default 2 for the shipped model, else 7.5)",
    )
    parser.add_argument(
        "--english-guidance",
        type=float,
        default=None,
        help="guidance scale of the English prompt apart, --guidance being the native one's (default: one for"
        " both; costs a third more where an English prompt is given)",
    )
    parser.add_argument(
        "--sampler", default=None, help="such as 'DPM++ 2M Karras' or euler_ancestral (default: the model's)"
    )
    parser.add_argument("--count", type=int, default=1, help="pictures for each prompt")
    parser.add_argument(
        "--branch-scale", type=float, default=1.0, help="strength of the branch; 0 is the bare backbone"
    )
    parser.add_argument("--width", type=int, default=None, help="in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, default=None, help="in pixels (default: the model's own)")
    parser.add_argument("--enlarge", type=int, default=1, help="enlarge the saved pictures by a whole factor")
    parser.add_argument(
        "--clip-skip",
        type=int,
        default=1,
        help="layer of the English text encoder, from the end (A1111; 1 is the last)",
    )
    parser.add_argument(
        "--device", default=None, help="such as cuda, cuda:1, mps or cpu (default: the best there is)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default=None,
        help="default: fp16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="say what the time went into, from the start of the process (not with --prompts)",
    )
    fast = parser.add_argument_group("approximate modes (another picture in less time)")
    fast.add_argument(
        "--guidance-interval",
        metavar="START:END",
        default="0:1",
        help="guidance only in this share of the steps, such as 0.1:0.8",
    )
    fast.add_argument(
        "--branch-every", type=int, default=1, metavar="N", help="the branch runs in every N-th step"
    )
    fast.add_argument(
        "--deep-every",
        type=int,
        default=1,
        metavar="N",
        help="all but the outermost blocks run in every N-th step",
    )
    plugins = parser.add_argument_group("plug-ins on the backbone (files from the English community)")
    plugins.add_argument(
        "--checkpoint", metavar="FILE", help="SD1.5 checkpoint: single file or diffusers folder"
    )
    plugins.add_argument(
        "--vae",
        metavar="FILE",
        help="another VAE: its own file or folder, or a checkpoint, whose VAE is taken",
    )
    plugins.add_argument(
        "--lora",
        metavar="FILE[:weight[:text-encoder weight]]",
        action="append",
        default=[],
        help="LoRA or relative; repeatable",
    )
    plugins.add_argument(
        "--embedding",
        metavar="FILE",
        action="append",
        default=[],
        help="textual inversion; its stem is the trigger",
    )
    plugins.add_argument(
        "--controlnet", metavar="FILE", action="append", default=[], help="file or folder; repeatable"
    )
    plugins.add_argument(
        "--control-image",
        metavar="IMAGE[:scale[:start:end]]",
        action="append",
        default=[],
        help="one for each --controlnet, in order",
    )
    plugins.add_argument(
        "--annotator",
        metavar="NAME",
        help="turn the control images into conditions first: canny, or a controlnet_aux detector",
    )


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

    _approximation(options)
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
        control_images = _attach_plugins(self.pipe, options)
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
            approximation=_approximation(options),
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


def _approximation(options: argparse.Namespace) -> Any:
    from ..speed.approximate import Approximation

    return Approximation(*_interval(options.guidance_interval), options.branch_every, options.deep_every)


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


def _attach_plugins(pipe: Any, options: argparse.Namespace) -> dict[str, Any] | None:
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
