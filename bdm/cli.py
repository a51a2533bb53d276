"""The ``bdm`` command: one function a sub-command; heavy imports happen inside them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    train.add_argument("--check", action="store_true", help="check and print the resolved configuration, then stop")
    train.add_argument(
        "--dry-run", action="store_true", help="one batch, one step, one save and one grid in a folder that is deleted"
    )
    train.set_defaults(run=_train)

    prepare = commands.add_parser("prepare", help="raw pictures -> shards of moments and text features to train from")
    prepare.add_argument("config", help="YAML file, such as configs/emoji/prepare.yaml")
    prepare.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.urls=/data/*.tar")
    prepare.add_argument("--engine", choices=("accelerate", "ray"), default="accelerate", help="who shares out the shards")
    prepare.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, then stop")
    prepare.set_defaults(run=_prepare)

    plan = commands.add_parser("plan", help="memory, time, cost and disk of a run, without its weights, its data or a GPU")
    plan.add_argument("config", help="YAML file, such as configs/sd15_chinese_clip.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.accumulation=10")
    _plan_options(plan)
    plan.set_defaults(run=_plan)

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

    bench = commands.add_parser("bench", help="measure us beside a peer: time, memory, operations, equal results")
    bench.add_argument("kind", choices=("infer", "train", "load"))
    bench.add_argument("config", help="YAML file, such as configs/bench/infer_64.yaml")
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.set_defaults(run=_bench)

    inspect = commands.add_parser("inspect", help="say what weight files are: kind, base, rank, trigger words, hashes")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a weight file in another layout, as safetensors")
    convert.add_argument("source", type=Path, help="checkpoint, VAE, LoRA, embedding, ControlNet or branch: file or folder")
    convert.add_argument("out", type=Path, help="file ending in .safetensors, or folder")
    convert.add_argument("--layout", required=True, help="original, diffusers, kohya, A1111 or BDM, as the kind allows")
    convert.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), help="precision of the written weights (default: as they are)"
    )
    convert.set_defaults(run=_convert)

    assemble = commands.add_parser("assemble", help="put trained parts together into one pipeline folder")
    assemble.add_argument("--backbone", required=True, help="folder or hub name of the SD1.5 model")
    assemble.add_argument("--branch", required=True, help="folder of the branch")
    assemble.add_argument("--native-text-encoder", required=True, help="folder or cn_clip file of the native text encoder")
    assemble.add_argument("--out", type=Path, required=True)
    assemble.add_argument("--fp16", action="store_true", help="store half precision")
    assemble.add_argument("--no-vocabularies", action="store_true", help="leave out vocabularies that pip packages carry")
    assemble.set_defaults(run=_assemble)
    return parser


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share a step (default 1)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each (default 80)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=312.0, metavar="X",
        help="dense rate of each at the precision in use (default 312, an A100 or A800 in bf16)",
    )  # fmt: skip
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of that rate that training reaches (default 0.4)")
    parser.add_argument("--price-per-hour", type=float, default=0.0, metavar="PRICE", help="of one GPU")
    parser.add_argument("--samples", type=int, default=None, metavar="N", help="size of the corpus (default: counted in the data)")


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
    plugins.add_argument("--vae", metavar="FILE", help="another VAE")
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
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process:
        print(text)
    if options.check:
        return
    from .extras import require_packages

    require_packages(run.optimizer.name, *run.trackers)
    from .recipes.build import build_recipe
    from .training import Stopped, train

    _quiet()
    if options.dry_run:
        _dry_run(run)
        return
    recipe = build_recipe(run)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        if main_process:
            (run.out / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run folder {run.out}: {error.strerror}; choose another with out=FOLDER") from None
    command = f"python train.py {options.config} {' '.join(options.overrides)}".strip()
    try:
        model = train(run, recipe, command)
        if main_process:
            print(model)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        # What a shell reports for a process that a signal ended: schedulers see that it did not finish.
        sys.exit(128 + stopped.number)


def _prepare(options: argparse.Namespace) -> None:
    import yaml

    from .config import PrepareConfig, read_config

    config = read_config(options.config, options.overrides, PrepareConfig)
    if int(os.environ.get("RANK", "0")) == 0:
        print(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    if options.dry_run:
        return
    from .prepare.report import describe_report
    from .prepare.run import prepare

    _quiet()
    if report := prepare(config, options.engine):
        print(describe_report(report, config.out))


def _dry_run(run: Any) -> None:
    """Build everything and go through one batch, one step, one save and one grid; says what each took and keeps nothing."""
    import tempfile

    from .metrics import read_metrics
    from .recipes.build import build_recipe
    from .training import timed, train

    logging.getLogger("bdm").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="bdm-dry-run-") as folder:
        out = Path(folder) / run.out.name
        out.mkdir()
        # Encoding the whole corpus first would be no rehearsal.
        recipe = run.recipe.model_copy(update={"cache": False} if hasattr(run.recipe, "cache") else {})
        every: dict[str, Any] = dict.fromkeys(("log_every", "validate_every", "grid_every", "checkpoint_every"), 1)
        once = run.optimizer.model_copy(update={"steps": 1, "warmup_steps": 0})
        short = run.model_copy(update={"out": out, "recipe": recipe, "optimizer": once, "trackers": (), **every})
        with timed("models and data"):
            built = build_recipe(short)
        train(short, built)
        if (out / "metrics.jsonl").is_file():  # the main process has it
            seconds = next(row["seconds"] for row in read_metrics(out) if "seconds" in row)
            print(f"dry run passed; the step of {run.optimizer.batch_size} samples took {seconds:.2f} s")


def _plan(options: argparse.Namespace) -> None:
    import json

    from .config import RunConfig, read_config
    from .plan.estimate import Machine, make_plan
    from .plan.report import plan_facts, plan_table

    run = read_config(options.config, options.overrides, RunConfig)
    machine = Machine(options.gpus, options.gpu_memory, options.gpu_tflops, options.utilisation, options.price_per_hour)
    _quiet()
    plan = make_plan(run, machine, options.samples)
    print(plan_table(plan))
    print(json.dumps(plan_facts(plan), ensure_ascii=False))


def _infer(options: argparse.Namespace) -> None:
    from .grid import save_picture
    from .picture_info import describe, picture_info
    from .samplers import make_scheduler

    if options.steps < 1 or options.count < 1 or options.enlarge < 1:
        raise UserError(f"--steps {options.steps}, --count {options.count}, --enlarge {options.enlarge}: each must be at least 1")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {options.out}: allowed endings are .png, .jpg and .webp")
    if options.sampler:
        make_scheduler(options.sampler)  # an unknown name is refused before anything heavy
    from .pipeline import BridgePipeline

    _quiet()
    pipe = BridgePipeline.from_pretrained(options.model)
    if options.sampler:
        pipe.scheduler = make_scheduler(options.sampler, pipe.scheduler.config["prediction_type"])
    control_images = _attach_plugins(pipe, options)
    guidance = options.guidance
    if guidance is None:
        guidance = 4.0 if Path(options.model) == DEFAULT_MODEL else 7.5
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


def _attach_plugins(pipe: Any, options: argparse.Namespace) -> dict[str, Any] | None:
    """Attach what the command line names; returns the control pictures by ControlNet."""
    from .controlnet import annotate, open_picture

    if len(options.controlnet) != len(options.control_image):
        raise UserError(
            f"{len(options.controlnet)} --controlnet and {len(options.control_image)} --control-image; give one image for each"
        )
    for source in (options.checkpoint, options.vae):
        if source:
            pipe.plugins.attach(source, _free_name(pipe, source))
    for text in options.lora:
        source, numbers = split_numbers(text, "--lora", (0, 1, 2))
        pipe.plugins.attach(source, _free_name(pipe, source), **dict(zip(("strength", "text_strength"), numbers, strict=False)))
    for source in options.embedding:
        pipe.plugins.attach(source)
    pictures = {}
    for i, (source, text) in enumerate(zip(options.controlnet, options.control_image, strict=True)):
        image, numbers = split_numbers(text, "--control-image", (0, 1, 3))
        picture = annotate(open_picture(image), options.annotator)
        settings = dict(zip(("strength", "start", "end"), numbers, strict=False))
        pictures[pipe.plugins.attach(source, f"controlnet-{i}", **settings).name] = picture
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


def _inspect(options: argparse.Namespace) -> None:
    from .formats.identify import describe_file

    for i, path in enumerate(options.files):
        facts = describe_file(path)
        width = max(map(len, facts))
        print(*([""] if i else []), path, *(f"  {name:<{width}}  {text}" for name, text in facts.items()), sep="\n")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from .convert import convert

    _quiet()
    dtypes = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    print(convert(options.source, options.out, options.layout, dtypes[options.dtype]))


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
    _quiet()
    if config.plugins is not None:
        from .evaluate.combinations import evaluate_combinations

        evaluate_combinations(config, config.plugins)
    else:
        from .evaluate.report import evaluate

        evaluate(config)


def _bench(options: argparse.Namespace) -> None:
    from .config import BENCHES, read_config

    config = read_config(options.config, options.overrides, BENCHES[options.kind])
    _quiet()
    from .bench.run import run_bench

    run_bench(config)


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
