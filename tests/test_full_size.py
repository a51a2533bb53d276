"""A single file of SD1.5's full size: how fast it loads and how much memory that takes, beside diffusers on the same file."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from bdm.formats.checkpoint import write_checkpoint
from bdm.formats.names import text_to_plain
from bdm.loss import SD15_SCHEDULE
from bdm.text.vocabulary import clip_tokenizer

TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu")
VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip

OURS = "from bdm.backbone import load_backbone\nrun = lambda: load_backbone({file!r}, torch.float16)"
PEER = (
    "from diffusers import StableDiffusionPipeline\nrun = lambda: StableDiffusionPipeline.from_single_file("
    "{file!r}, config={folder!r}, local_files_only=True, torch_dtype=torch.float16, safety_checker=None)"
)
MEASURE = """
import json, resource, sys, time, torch
{prepare}
import bdm.text.vocabulary; bdm.text.vocabulary.clip_tokenizer()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
kept = run()
seconds = time.perf_counter() - start
total = sum(float(p.float().abs().sum()) for p in kept.unet.parameters())
print(json.dumps(dict(seconds=seconds, peak=peak() - before, total=total)))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    with init_empty_weights():
        parts = {
            "unet": UNet2DConditionModel(cross_attention_dim=768), "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        }  # fmt: skip
    weights = {}
    for name, part in parts.items():
        state = text_to_plain(part.state_dict()) if name == "text_encoder" else part.state_dict()
        weights[name] = {key: torch.rand(value.shape).mul_(0.02).half() for key, value in state.items()}
        (folder / name).mkdir()
        config = part.config.to_json_string() if name == "text_encoder" else part.to_json_string()
        (folder / name / "config.json").write_text(config)
    assert sum(t.numel() for t in weights["unet"].values()) == 859_520_964
    save_file(write_checkpoint(weights), folder / "model.safetensors")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SD15_SCHEDULE).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.36.0", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def measure(prepare, folder):
    code = MEASURE.format(prepare=prepare.format(file=str(folder / "model.safetensors"), folder=str(folder)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_full_size_file_loads_in_its_own_size_and_no_slower_than_diffusers(full_size):
    size = (full_size / "model.safetensors").stat().st_size
    ours, theirs = [], []
    for _ in range(3):
        ours.append(measure(OURS, full_size))
        theirs.append(measure(PEER, full_size))
    assert ours[0]["total"] == theirs[0]["total"]
    ratios = sorted(t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True))
    memory = max(o["peak"] for o in ours) / size
    peer_memory = max(t["peak"] for t in theirs) / size
    times = f"time of diffusers / ours {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"
    print(f"\n{times}; peak / file size {memory:.2f}, diffusers {peer_memory:.2f}")
    assert ratios[1] >= 1.0
    assert memory <= 1.3
