"""ComfyUI itself draws what the pipeline draws; ``make test-comfyui BDM_COMFYUI=FOLDER`` runs it.

``BDM_COMFYUI`` is a checkout of ComfyUI, ``BDM_COMFYUI_PYTHON`` a Python with its requirements and bdm's.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from community_files import make_controlnet
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from bdm import BridgePipeline
from bdm.convert import convert
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.shipped import shipped
from bdm.text.english import encode_english
from bdm.text.rules import OFFICIAL, PromptRules

PROGRAM = os.environ.get("BDM_COMFYUI", "")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not PROGRAM, reason="BDM_COMFYUI names no checkout")]
ROOT = Path(__file__).parents[2]
STEPS, GUIDANCE = 12, 5.0
LARGEST = 1e-3
ENGLISH = ["a photo", "blurry"]
#: Native text, negative and scale of each node in a row, and what else is in the workflow.
CASES = {
    "plain": {"told": [["红灯笼", "模糊", 1.0]]},
    "long": {"told": [["很长的一句话，" * 12 + "红灯笼", "", 1.0]]},
    "weighed": {"told": [["（红：1.4）灯笼", "", 0.6]]},
    "official": {"told": [["(红)灯笼，蓝色背景", "", 1.0]], "rules": "official"},
    "lora": {"told": [["月饼", "", 1.0]], "lora": "lora.safetensors"},
    "controlnet before": {"told": [["龙", "", 1.0]], "controlnet": "before"},
    "controlnet after": {"told": [["龙", "", 1.0]], "controlnet": "after"},
    "two branches": {"told": [["龙", "", 0.6], ["红灯笼", "", 0.5]]},
    "without": {"told": []},
}
CASES = {name: {"rules": "A1111", "guidance": GUIDANCE, **case} for name, case in CASES.items()}


def make_scheduler():
    return EulerDiscreteScheduler.from_config(SD15_SCHEDULE, timestep_spacing="leading")


@pytest.fixture(scope="module")
def pipe():
    pipe = BridgePipeline.from_pretrained(shipped("assets/emoji"), torch_dtype=torch.float32)
    pipe.scheduler = make_scheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_lora(unet, dice):
    """A LoRA in kohya's layout of all that reads texts in the UNet."""
    weights = {}
    for name, module in unet.named_modules():
        if ".attn2.to_" in name and hasattr(module, "weight"):
            wide, narrow = module.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            weights[f"{key}.lora_down.weight"] = torch.randn(4, narrow, generator=dice) * 0.1
            weights[f"{key}.lora_up.weight"] = torch.randn(wide, 4, generator=dice) * 0.1
            weights[f"{key}.alpha"] = torch.tensor(4.0)
    return weights


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """All that ComfyUI is given."""
    folder = tmp_path_factory.mktemp("comfyui")
    convert(shipped("assets/emoji"), folder / "checkpoint.safetensors", "original")
    pipe.branch.save_pretrained(folder / "models/bdm_branches/emoji")
    pipe.native_text_encoder.save_pretrained(folder / "models/bdm_text/emoji")
    make_controlnet(pipe.unet, (16, 32, 96, 256)).save_pretrained(folder / "controlnet")
    convert(folder / "controlnet", folder / "controlnet.safetensors", "original")
    dice = torch.Generator().manual_seed(9)
    save_file(make_lora(pipe.unet, dice), folder / "lora.safetensors")
    scheduler = make_scheduler()
    scheduler.set_timesteps(STEPS)
    positive, negative = encode_english(ENGLISH, pipe.text_encoder, pipe.tokenizer).split(1)
    save_file(
        {"noise": torch.randn(1, 4, 8, 8, generator=dice), "sigmas": scheduler.sigmas,
         "positive": positive.contiguous(), "negative": negative.contiguous(),
         "picture": torch.rand(1, 3, 64, 64, generator=dice)},
        folder / "given.safetensors",
    )  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    python = os.environ.get("BDM_COMFYUI_PYTHON", sys.executable)
    script = Path(__file__).parent / "real_program.py"
    done = subprocess.run(
        [python, script, Path(PROGRAM).absolute(), folder],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "drawn.safetensors")


def ours(pipe, folder, case):
    given = load_file(folder / "given.safetensors")
    # ComfyUI begins with noise of the first sigma, the scheduler with sqrt(sigma^2 + 1) where that is not the
    # schedule's last.
    sigma = given["sigmas"][0]
    latents = given["noise"] * sigma / (sigma**2 + 1) ** 0.5
    (first, *others) = case["told"] or [["", "", 0.0]]
    rules = OFFICIAL if case["rules"] == "official" else PromptRules(routing=False)
    settings = {}
    with ExitStack() as stack:
        if "lora" in case:
            pipe.plugins.attach(folder / case["lora"])
            stack.callback(pipe.plugins.detach, "lora")
        if "controlnet" in case:
            pipe.plugins.attach(folder / "controlnet", strength=0.8)
            stack.callback(pipe.plugins.detach, "controlnet")
            settings["control_images"] = {"controlnet": given["picture"]}
        if others:
            pipe.add_branch("again", pipe.branch, pipe.native_text_encoder)
            stack.callback(pipe.remove_branch, "again")
            ((prompt, negative, scale),) = others
            settings["beside"] = {"again": {"prompt": prompt, "negative_prompt": negative, "scale": scale}}
        return pipe(
            first[0], negative_prompt=first[1], branch_scale=first[2], prompt_en=ENGLISH[0],
            negative_prompt_en=ENGLISH[1], num_inference_steps=STEPS, guidance_scale=case["guidance"],
            latents=latents, output_type="latent", prompt_rules=rules, **settings,
        ).images  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_latents_agree(pipe, folder, theirs, name):
    drawn = ours(pipe, folder, CASES[name])
    apart = (theirs[name] - drawn).abs().max().item()
    print(f"{name}: {apart:.2g} of {drawn.abs().max():.3g}")
    assert apart < LARGEST
    if CASES[name]["told"]:
        assert (drawn - theirs["without"]).abs().max() > 0.1
