"""The ``bdm`` command: one function a sub-command; heavy imports happen inside them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEFAULT_MODEL = ASSETS / "emoji"

#: The demo's prompts: native concepts, concepts the worlds see differently, and pairs of concept and colour.
DEMO_PROMPTS = (
    "红灯笼，蓝色背景", "红包", "月饼，绿色背景", "饺子", "爆竹，黄色背景", "龙", "筷子，粉色背景", "折扇",
    "苹果，红色背景", "西瓜", "雨伞，紫色背景", "吉他", "向日葵", "狮子，橙色背景", "火箭", "蝴蝶，白色背景",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command. Returns the exit status: 0, or 2 after a mistake that one line explains."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse lets no positional follow an option; here key=value may stand anywhere.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = [*getattr(options, "overrides", []), *rest]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bdm", description="Bridge Diffusion Models: train, draw, evaluate.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train what a configuration describes")
    train.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.steps=100")
    train.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, then stop")
    train.set_defaults(run=_train)

    infer = commands.add_parser("infer", help="draw pictures for native prompts")
    _infer_options(infer)
    infer.set_defaults(run=_infer)

    demo = commands.add_parser("demo", help="draw a labelled grid of Chinese prompts with the shipped weights")
    demo.add_argument("--out", type=Path, default=Path("demo.png"))
    demo.add_argument("--model", default=str(DEFAULT_MODEL))
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, default=20)
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser("evaluate", help="score a model with the independent judge and write a report")
    evaluate.add_argument("config", help="YAML file, such as configs/emoji/evaluate.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(run=_evaluate)

    assemble = commands.add_parser("assemble", help="put trained parts together into one pipeline folder")
    assemble.add_argument("--backbone", required=True, help="folder or hub name of the SD1.5 model")
    assemble.add_argument("--branch", required=True, help="folder of the branch")
    assemble.add_argument("--native-text-encoder", required=True, help="folder or cn_clip file of the native text encoder")
    assemble.add_argument("--out", type=Path, required=True)
    assemble.add_argument("--fp16", action="store_true", help="store half precision")
    assemble.add_argument("--no-vocabularies", action="store_true", help="leave out vocabularies that pip packages carry")
    assemble.set_defaults(run=_assemble)
    return parser


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


def _quiet() -> None:
    """Keep the libraries' own bars and notices out of what the user reads."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _train(options: argparse.Namespace) -> None:
    import yaml

    from .config import RunConfig, read_config

    run = read_config(options.config, options.overrides, RunConfig)
    text = yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)
    if options.dry_run:
        return
    from .recipes.build import build_recipe
    from .training import train

    _quiet()
    recipe = build_recipe(run)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run folder {run.out}: {error.strerror}; choose another with out=FOLDER") from None
    command = f"python train.py {options.config} {' '.join(options.overrides)}".strip()
    print(train(run, recipe, command))


def _infer(options: argparse.Namespace) -> None:
    from .grid import save_picture
    from .picture_info import describe, picture_info
    from .samplers import make_scheduler

    if options.steps < 1 or options.count < 1 or options.enlarge < 1:
        raise UserError(f"--steps {options.steps}, --count {options.count}, --enlarge {options.enlarge}: each must be at least 1")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {options.out}: allowed endings are .png, .jpg and .webp")
    scheduler = make_scheduler(options.sampler) if options.sampler else None
    from .pipeline import BridgePipeline

    _quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    if scheduler is not None:
        pipe.scheduler = scheduler
    guidance = options.guidance
    if guidance is None:
        guidance = 4.0 if Path(options.model) == DEFAULT_MODEL else 7.5
    pictures = pipe(
        options.prompt, options.negative, prompt_en=options.prompt_en, negative_prompt_en=options.negative_en,
        seed=options.seed, num_inference_steps=options.steps, guidance_scale=guidance, num_images_per_prompt=options.count,
        branch_scale=options.branch_scale, width=options.width, height=options.height,
    ).images  # fmt: skip
    for i, picture in enumerate(pictures):
        path = options.out if len(pictures) == 1 else options.out.with_stem(f"{options.out.stem}-{i}")
        facts = describe(
            options.prompt[i // options.count], options.negative, options.prompt_en, options.negative_en, options.seed + i,
            options.steps, guidance, options.sampler or type(pipe.scheduler).__name__, options.branch_scale, picture.size,
            str(options.model),
        )  # fmt: skip
        picture = picture.resize((picture.width * options.enlarge, picture.height * options.enlarge), 0)
        save_picture(picture, path, **picture_info(facts, path.suffix))
        print(path)


def _demo(options: argparse.Namespace) -> None:
    from .grid import labelled_grid, save_picture
    from .pipeline import BridgePipeline

    _quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    pictures = pipe(list(DEMO_PROMPTS), seed=options.seed, num_inference_steps=options.steps, guidance_scale=4.0).images
    save_picture(labelled_grid(pictures, list(DEMO_PROMPTS), columns=8, scale=4), options.out)
    print(options.out.resolve())


def _evaluate(options: argparse.Namespace) -> None:
    from .config import EvaluateConfig, read_config

    config = read_config(options.config, options.overrides, EvaluateConfig)
    from .evaluate.report import evaluate

    _quiet()
    evaluate(config)


def _assemble(options: argparse.Namespace) -> None:
    import torch

    from .assemble import assemble

    _quiet()
    dtype = torch.float16 if options.fp16 else torch.float32
    assemble(options.backbone, options.branch, options.native_text_encoder, options.out, dtype, not options.no_vocabularies)
    print(options.out)


def console() -> None:
    """Entry point of the ``bdm`` command."""
    sys.exit(main())
