"""``infer`` and ``demo``: prompts -> pictures."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from ..errors import UserError
from .quiet import quiet

ASSETS = Path(__file__).resolve().parents[2] / "assets"
DEFAULT_MODEL = ASSETS / "emoji"

#: The demo's prompts: native concepts, concepts the worlds see differently, and pairs of concept and colour.
DEMO_PROMPTS = (
    "红灯笼，蓝色背景", "红包", "月饼，绿色背景", "饺子", "爆竹，黄色背景", "龙", "筷子，粉色背景", "折扇",
    "苹果，红色背景", "西瓜", "雨伞，紫色背景", "吉他", "向日葵", "狮子，橙色背景", "火箭", "蝴蝶，白色背景",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    infer = commands.add_parser("infer", help="draw pictures for native prompts")
    _infer_options(infer)
    infer.set_defaults(run=_infer)

    demo = commands.add_parser("demo", help="draw a labelled grid of Chinese prompts with the shipped weights")
    demo.add_argument("--out", type=Path, default=Path("demo.png"))
    demo.add_argument("--model", default=str(DEFAULT_MODEL))
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, default=20)
    demo.set_defaults(run=_demo)


def _infer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", help='native prompts, such as "红灯笼，蓝色背景"')
    parser.add_argument(
        "--out", type=Path, default=Path("out.png"), help="picture file; numbered if there are several (default out.png)"
    )
    parser.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="pipeline folder or hub name (default: the shipped emoji model)"
    )
    parser.add_argument("--negative", default="", help="native negative prompt")
    parser.add_argument("--prompt-en", default="", help='English prompt of the backbone (default "")')
    parser.add_argument("--negative-en", default="", help="English negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default 4 for the shipped model, else 7.5)")
    parser.add_argument("--sampler", default=None, help="such as 'DPM++ 2M Karras' or euler_ancestral (default: the model's)")
    parser.add_argument("--count", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--branch-scale", type=float, default=1.0, help="strength of the branch; 0 is the bare backbone")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--enlarge", type=int, default=1, help="enlarge the saved pictures by a whole factor")
    parser.add_argument(
        "--clip-skip", type=int, default=1, help="layer of the English text encoder, from the end (A1111; 1 is the last)"
    )
    plugins = parser.add_argument_group("plug-ins on the backbone (files from the English community)")
    plugins.add_argument("--checkpoint", metavar="FILE", help="SD1.5 checkpoint: single file or diffusers folder")
    plugins.add_argument("--vae", metavar="FILE", help="another VAE: its own file or folder, or a checkpoint, whose VAE is taken")
    plugins.add_argument(
        "--lora", metavar="FILE[:weight[:text-encoder weight]]", action="append", default=[], help="LoRA or relative; repeatable"
    )
    plugins.add_argument(
        "--embedding", metavar="FILE", action="append", default=[], help="textual inversion; its stem is the trigger"
    )
    plugins.add_argument("--controlnet", metavar="FILE", action="append", default=[], help="file or folder; repeatable")
    plugins.add_argument(
        "--control-image",
        metavar="IMAGE[:scale[:start:end]]",
        action="append",
        default=[],
        help="one for each --controlnet, in order",
    )
    plugins.add_argument(
        "--annotator", metavar="NAME", help="turn the control images into conditions first: canny, or a controlnet_aux detector"
    )


def _infer(options: argparse.Namespace) -> None:
    from ..grid import save_picture
    from ..picture_info import describe, picture_info
    from ..samplers import make_scheduler

    if options.steps < 1 or options.count < 1 or options.enlarge < 1:
        raise UserError(f"--steps {options.steps}, --count {options.count}, --enlarge {options.enlarge}: each must be at least 1")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {options.out}: allowed endings are .png, .jpg and .webp")
    if options.sampler:
        make_scheduler(options.sampler)  # an unknown name is refused before anything heavy
    from ..pipeline import BridgePipeline

    quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    if options.sampler:
        pipe.scheduler = make_scheduler(options.sampler, pipe.scheduler.config["prediction_type"])
    control_images = _attach_plugins(pipe, options)
    guidance = options.guidance
    if guidance is None:
        guidance = default_guidance(options.model)
    pictures = pipe(
        options.prompt, options.negative, prompt_en=options.prompt_en, negative_prompt_en=options.negative_en,
        seed=options.seed, num_inference_steps=options.steps, guidance_scale=guidance, num_images_per_prompt=options.count,
        branch_scale=options.branch_scale, width=options.width, height=options.height, clip_skip=options.clip_skip,
        control_images=control_images,
    ).images  # fmt: skip
    for i, picture in enumerate(pictures):
        path = options.out if len(pictures) == 1 else options.out.with_stem(f"{options.out.stem}-{i}")
        facts = describe(
            options.prompt[i // options.count], options.negative, options.prompt_en, options.negative_en, options.seed + i,
            options.steps, guidance, options.sampler or type(pipe.scheduler).__name__, options.branch_scale, picture.size,
            str(options.model), options.clip_skip, list(pipe.plugins),
        )  # fmt: skip
        picture = picture.resize((picture.width * options.enlarge, picture.height * options.enlarge), 0)
        save_picture(picture, path, **picture_info(facts, path.suffix))
        print(path)


def default_guidance(model: str) -> float:
    """Guidance scale of the shipped model, however its path is written, or Stable Diffusion's usual one."""
    return 4.0 if Path(model).resolve() == DEFAULT_MODEL else 7.5


def _attach_plugins(pipe: Any, options: argparse.Namespace) -> dict[str, Any] | None:
    """Attach what the command line names; returns the control pictures by ControlNet."""
    from ..controlnet import annotate, open_picture

    if len(options.controlnet) != len(options.control_image):
        raise UserError(
            f"{len(options.controlnet)} --controlnet and {len(options.control_image)} --control-image; give one image for each"
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
    triggers = [plugin.name for plugin in pipe.plugins if plugin.kind == "embedding"]
    if triggers and not (options.prompt_en or options.negative_en):
        logging.warning("embeddings act through the English prompt; --prompt-en or --negative-en must name %s", ", ".join(triggers))
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
        raise UserError(f"{option} {text}: {len(numbers)} numbers behind the file; allowed are {' or '.join(map(str, counts))}")
    return ":".join(parts), numbers


def _demo(options: argparse.Namespace) -> None:
    from ..grid import labelled_grid, save_picture
    from ..pipeline import BridgePipeline

    quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    pictures = pipe(list(DEMO_PROMPTS), seed=options.seed, num_inference_steps=options.steps, guidance_scale=4.0).images
    save_picture(labelled_grid(pictures, list(DEMO_PROMPTS), columns=8, scale=4), options.out)
    print(options.out.resolve())
