"""The options of ``infer``. Those that say something of a request are None where they are not given."""

from __future__ import annotations

import argparse
from pathlib import Path

from .draw_beside import beside_options
from .draw_modes import mode_options, rule_options
from .model_options import device_option, model_options


def infer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``infer`` to its parser."""
    parser.epilog = (
        "Names of other programs are understood: --negative-prompt, --cfg-scale, --sampler-name, --scheduler,"
        " --num-inference-steps, --init-image, --denoising-strength, --mask-image, --n-iter and others."
    )
    parser.add_argument("prompt", nargs="*", help='native prompts, such as "红灯笼，蓝色背景"')
    parser.add_argument(
        "--prompt",
        dest="named_prompts",
        action="append",
        default=[],
        metavar="PROMPT",
        help="a native prompt too; repeatable",
    )
    _sources(parser)
    _files(parser)
    _texts(parser)
    _numbers(parser)
    _machine(parser)
    rule_options(parser.add_argument_group("how prompts are read"))
    mode_options(parser.add_argument_group("pictures to start from"))
    beside_options(parser.add_argument_group("branches beside the model's own"))
    _approximations(parser.add_argument_group("approximate modes (another picture in less time)"))
    _plugins(parser.add_argument_group("plug-ins on the backbone (files from the English community)"))


def _sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "a native prompt in each line, or A1111's options (--prompt ... --seed ...); .json, .jsonl, .csv"
            " or .tsv with prompt, negative, prompt_en, seed and others; rows of BDM-870. Under accelerate"
            " launch the processes share them"
        ),
    )
    parser.add_argument(
        "--from",
        dest="pictures",
        nargs="+",
        type=Path,
        default=[],
        metavar="PICTURE",
        help="draw pictures again by what is written in them; options that are given beside it change that",
    )
    parser.add_argument(
        "--partly",
        action="store_true",
        help="with --from: draw what can be drawn of A1111's text, where it says more or files are missing",
    )
    parser.add_argument(
        "--long-prompts", action="store_true", help="the long prompts of rows of BDM-870, not the short ones"
    )
    parser.add_argument(
        "--translations",
        action="store_true",
        help="the English texts of rows of BDM-870 for the backbone, as the official script has it",
    )
    parser.add_argument(
        "--engine",
        choices=("accelerate", "ray"),
        default="accelerate",
        help="who shares out the rows of a --prompts file",
    )
    parser.add_argument("--count", type=int, default=1, help="pictures for each prompt")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="pictures that are drawn at once (default 1; more are faster, and their last bits may differ)",
    )


def _files(parser: argparse.ArgumentParser) -> None:
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
        "--names",
        metavar="PATTERN",
        help="names of the files in the folder --out, such as '[number]-[seed]-[prompt].png'",
    )
    parser.add_argument(
        "--grid", type=Path, metavar="FILE", help="all pictures on one sheet too, with prompts and seeds"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw pictures that are there already, by their own JSON, too"
    )
    model_options(parser)
    parser.add_argument(
        "--branch",
        metavar="FOLDER",
        help="another branch than the model's own: its folder, or that of a pipeline, whose native text"
        " encoder comes along",
    )


def _texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", help="native negative prompt")
    parser.add_argument("--prompt-en", help='English prompt of the backbone (default "")')
    parser.add_argument("--negative-en", help="English negative prompt")


def _numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="picture i uses seed + i (default 0)")
    parser.add_argument("--steps", type=int, help="of each picture (default 30)")
    parser.add_argument(
        "--guidance", type=float, help="guidance scale (default 2 for the shipped model, else 7.5)"
    )
    parser.add_argument(
        "--english-guidance",
        type=float,
        help="guidance scale of the English prompt apart, --guidance being the native one's (default: one for"
        " both; costs a third more where an English prompt is given)",
    )
    parser.add_argument(
        "--sampler", help="such as 'DPM++ 2M Karras' or euler_ancestral (default: the model's)"
    )
    parser.add_argument(
        "--branch-scale", type=float, help="strength of the branch (default 1); 0 is the bare backbone"
    )
    parser.add_argument(
        "--schedule", help="of the sampler, such as Karras or SGM Uniform (default: the sampler's own)"
    )
    parser.add_argument(
        "--branch-schedule",
        metavar="FROM:TO:SCALE,...",
        help="strength of the branch over the steps, such as 0:0.2:0,0.2:1:1, or a curve's points: 0:0,0.5:1",
    )
    parser.add_argument(
        "--world", type=float, help="0 draws the native world, 1 the English one (with --prompt-en)"
    )
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--enlarge", type=int, help="enlarge the saved pictures by a whole factor")
    parser.add_argument(
        "--clip-skip", type=int, help="layer of the English text encoder, from the end (A1111; 1 is the last)"
    )


def _machine(parser: argparse.ArgumentParser) -> None:
    device_option(parser)
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="say what the time went into, from the start of the process (not with --prompts)",
    )


def attention_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of attention strips."""
    group.add_argument(
        "--attention",
        action="store_true",
        help="a strip beside each picture (NAME-attention.png): what the branch looked at for the native"
        " words and the backbone for the English ones",
    )
    group.add_argument(
        "--attention-words",
        metavar="WORD,WORD",
        help="of either prompt, such as '红灯笼,蓝色' (default: what stands between punctuation, and every"
        " English word)",
    )


def _approximations(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--guidance-interval",
        metavar="START:END",
        help="guidance only in this share of the steps, such as 0.1:0.8",
    )
    group.add_argument("--branch-every", type=int, metavar="N", help="the branch runs in every N-th step")
    group.add_argument(
        "--deep-every", type=int, metavar="N", help="all but the outermost blocks run in every N-th step"
    )


def _plugins(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint", metavar="FILE", help="SD1.5 checkpoint: single file or diffusers folder"
    )
    group.add_argument(
        "--vae",
        metavar="FILE",
        help="another VAE: its own file or folder, or a checkpoint, whose VAE is taken",
    )
    group.add_argument(
        "--lora",
        metavar="FILE[:weight[:text-encoder weight]]",
        action="append",
        default=[],
        help="LoRA or relative; repeatable; with --models its name, alias or hash will do",
    )
    group.add_argument(
        "--embedding",
        metavar="FILE",
        action="append",
        default=[],
        help="textual inversion; its stem is the trigger",
    )
    group.add_argument(
        "--controlnet", metavar="FILE", action="append", default=[], help="file or folder; repeatable"
    )
    group.add_argument(
        "--control-image",
        metavar="IMAGE[:scale[:start:end]]",
        action="append",
        default=[],
        help="one for each --controlnet, in order",
    )
    group.add_argument(
        "--annotator",
        metavar="NAME",
        help="turn the control images into conditions first: canny, or a controlnet_aux detector",
    )
    group.add_argument(
        "--ip-adapter", metavar="FILE", help="IP-Adapter for SD1.5, which shows --ip-image to the backbone"
    )
    group.add_argument("--ip-image", metavar="IMAGE", help="picture as a prompt, for --ip-adapter")
    group.add_argument("--ip-scale", type=float, help="strength of --ip-adapter (default 1)")
    group.add_argument(
        "--ip-encoder",
        metavar="FOLDER",
        help="image encoder that the IP-Adapter was made for (default: the pipeline's own)",
    )
