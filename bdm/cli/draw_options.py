"""The options of ``infer``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .painter import DEFAULT_MODEL


def infer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``infer`` to its parser."""
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
