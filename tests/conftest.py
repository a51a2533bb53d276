"""What all tests share: tiny models as fixtures, one thread, a cache of their own."""

from __future__ import annotations

import os

import pytest
import torch
from community_files import make_controlnet, write_original
from diffusers import DDIMScheduler, UNet2DConditionModel
from peer.checkout import markers
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_branch, make_native, make_text_encoder, make_unet, make_vae
from transformers import CLIPTextModel

from bdm.cli.language import speak
from bdm.formats import names
from bdm.method.branch import BranchModel
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.pipeline import BridgePipeline
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import clip_tokenizer

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

# Processes that tests start get one thread each; without it accelerate warns, and warnings are errors here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Messages are compared in English, whatever the machine speaks.
os.environ["LC_ALL"] = "C.UTF-8"


def pytest_configure(config: pytest.Config) -> None:
    for name in markers():  # of a checkout of diffusers (see tests/peer), if there is one
        config.addinivalue_line("markers", f"{name}: diffusers' own")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    speak("en")  # a command before may have spoken another language


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def branch(unet) -> BranchModel:
    return make_branch(unet)


@pytest.fixture
def native() -> NativeTextEncoder:
    return make_native()


@pytest.fixture
def text_encoder() -> CLIPTextModel:
    return make_text_encoder()


@pytest.fixture
def pipe(unet, branch, native, text_encoder) -> BridgePipeline:
    pipe = BridgePipeline(
        make_vae(), text_encoder, clip_tokenizer(), unet, DDIMScheduler(**SD15_SCHEDULE), branch, native
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The user's cache is left alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        (folder / "bdm").mkdir()
        yield folder / "bdm"


@pytest.fixture
def files(pipe, tmp_path):
    """One file of each kind, made for the tiny pipeline."""
    torch.manual_seed(3)
    other_text = CLIPTextModel(pipe.text_encoder.config)
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": other_text})()
    write_original(other, tmp_path / "style.safetensors")
    save_file(
        {k: v.contiguous() for k, v in names.vae_to_original(make_vae().state_dict()).items()},
        tmp_path / "colours.safetensors",
    )
    save_file(
        {
            f"lora_unet_{ATTENTION}.lora_down.weight": torch.randn(2, TEXT_DIM),
            f"lora_unet_{ATTENTION}.lora_up.weight": torch.randn(16, 2),
            f"lora_unet_{ATTENTION}.alpha": torch.tensor(1.0),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, TEXT_DIM),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(32, 2),
        },
        tmp_path / "ink.safetensors",
    )  # fmt: skip
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.diff": torch.randn(32, 32, 1, 1) * 0.2,
         "lora_unet_mid_block_attentions_0_proj_in.diff_b": torch.randn(32)},
        tmp_path / "shift.safetensors",
    )  # fmt: skip
    # No metadata tells the tiny network's groups and heads, so the ControlNet comes as a folder.
    make_controlnet(pipe.unet).save_pretrained(tmp_path / "edges")
    torch.save(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.randn(3, TEXT_DIM)},
            "name": "x",
            "step": 5,
        },
        tmp_path / "mood.pt",
    )
    return {path.stem: path for path in tmp_path.iterdir()}
