"""Draws with ComfyUI itself and the node pack; run by its Python: FOLDER OF COMFYUI, FOLDER OF THE TEST.

The test's folder has ``checkpoint.safetensors``, a LoRA, a ControlNet, ``models/`` with a branch and a text
encoder, and ``given.safetensors`` (noise, sigmas, English features, the ControlNet's picture). For each line
of ``cases.json`` the latents go into ``drawn.safetensors``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

PROGRAM, FOLDER = map(Path, sys.argv[1:])
PACK = Path(__file__).parents[2] / "comfyui"
sys.path.insert(0, str(PROGRAM))
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.controlnet  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def load_pack():
    folder_paths.models_dir = str(FOLDER / "models")
    where = PACK / "__init__.py"
    spec = importlib.util.spec_from_file_location("bdm_nodes", where, submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["bdm_nodes"] = module
    spec.loader.exec_module(module)
    return {name.removeprefix("BDM"): node() for name, node in module.NODE_CLASS_MAPPINGS.items()}


def load_model(lora=None):
    """ComfyUI knows models by their sizes, and the small one's are not among them."""

    known = comfy.supported_models.SD15
    sizes = known.unet_config | {"context_dim": 128, "model_channels": 64}
    small = type("Small", (known,), {"unet_config": sizes})
    if not any(each.unet_config == sizes for each in comfy.supported_models.models):
        comfy.supported_models.models.insert(0, small)
    path = str(FOLDER / "checkpoint.safetensors")
    model, *_ = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)
    if lora is not None:
        weights = comfy.utils.load_torch_file(str(FOLDER / lora), safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
    return model


def with_controlnet(conditionings, picture, strength):
    """What ComfyUI's own node does, by its public calls."""
    network, chained = comfy.controlnet.load_controlnet(str(FOLDER / "controlnet.safetensors")), {}
    for side in conditionings:
        for one in side:
            earlier = one[1].get("control")
            if earlier not in chained:
                chained[earlier] = network.copy().set_cond_hint(picture, strength)
                chained[earlier].set_previous_controlnet(earlier)
            one[1] = {**one[1], "control": chained[earlier], "control_apply_to_uncond": False}
    return conditionings


def draw(case, nodes, given):
    english = [[[given[side], {}]] for side in ("positive", "negative")]
    (branch,) = nodes["LoadBranch"].load("emoji", "fp32")
    (text,) = nodes["LoadNativeText"].load("emoji", "fp32")
    where = case.get("controlnet")
    told = with_controlnet(english, given["picture"], 0.8) if where == "before" else english
    for native, negative, scale in case["told"]:
        said = (native, negative, scale, 0.0, 1.0, case["rules"])
        told = nodes["BilingualPrompts"].tell(*told, branch, text, *said)
    if where == "after":
        told = with_controlnet(told, given["picture"], 0.8)
    sampler, zeros = comfy.samplers.sampler_object("euler"), torch.zeros_like(given["noise"])
    latents = comfy.sample.sample_custom(
        load_model(case.get("lora")), given["noise"], case["guidance"], sampler, given["sigmas"], *told,
        zeros, disable_pbar=True, seed=0,
    )  # fmt: skip
    return latents * 0.18215  # ComfyUI's are those before SD1.5's factor


with torch.inference_mode():
    nodes, given = load_pack(), load_file(FOLDER / "given.safetensors")
    cases = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
    drawn = {name: draw(case, nodes, given).clone() for name, case in cases.items()}
    save_file(drawn, FOLDER / "drawn.safetensors")
