"""``from_pipe``, between stock pipelines and ours and among ours, and diffusers' Auto pipelines."""

import subprocess
import sys

import pytest
import torch
from community_files import make_controlnet
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from PIL import Image
from tiny import make_branch, make_unet

from bdm.errors import UserError
from bdm.pipeline import (
    BridgeControlNetPipeline,
    BridgeImg2ImgPipeline,
    BridgeInpaintPipeline,
    BridgePipeline,
)

SHARED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
OURS = (*SHARED, "branch", "native_text_encoder")
KINDS = (BridgePipeline, BridgeImg2ImgPipeline, BridgeInpaintPipeline, BridgeControlNetPipeline)


@pytest.fixture
def controlnet(unet):
    return make_controlnet(unet)


def stock(pipe, kind=StableDiffusionPipeline, **parts):
    parts = {name: getattr(pipe, name) for name in SHARED} | parts
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def further(kind, controlnet):
    return {"controlnet": controlnet} if "ControlNet" in kind.__name__ else {}


@torch.no_grad()
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    inputs = {"image": Image.new("RGB", (64, 64), "red"), "mask_image": Image.new("L", (64, 64), 255)}
    inputs |= {"strength": 1.0}
    taken = {"Img2Img": ("image", "strength"), "Inpaint": tuple(inputs), "ControlNet": ("image",)}
    names = next((names for word, names in taken.items() if word in type(pipe).__name__), ())
    seed = {"generator": torch.Generator().manual_seed(0)}
    call = dict(prompt="龙", num_inference_steps=2, guidance_scale=3.0, output_type="latent", **seed)
    return pipe(**call, **{name: inputs[name] for name in names}).images


def parts_of(pipe, names):
    return [getattr(pipe, name) for name in names]


def same(ours, theirs):
    return all(a is b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_among_our_pipelines(pipe, controlnet, source, kind):
    first = source.from_pipe(pipe, **further(source, controlnet))
    second = kind.from_pipe(first, **further(kind, controlnet))
    assert type(second) is kind
    assert same(parts_of(second, OURS), parts_of(pipe, OURS))
    built = kind(**dict(zip(OURS, parts_of(pipe, OURS), strict=True)), **further(kind, controlnet))
    assert torch.equal(draw(second), draw(built))
    back = source.from_pipe(second, **further(source, controlnet))
    assert torch.equal(draw(back), draw(first))


@pytest.mark.parametrize(
    "kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionControlNetPipeline]
)
@pytest.mark.parametrize("ours", KINDS)
def test_from_a_stock_pipeline_and_back(pipe, controlnet, kind, ours):
    first = stock(pipe, kind, **further(kind, controlnet))
    added = {"branch": pipe.branch, "native_text_encoder": pipe.native_text_encoder}
    made = ours.from_pipe(first, **added, **further(ours, controlnet))
    assert same(parts_of(made, OURS), parts_of(pipe, OURS))
    assert not made.config.requires_safety_checker
    back = kind.from_pipe(made, **further(kind, controlnet))
    assert same(parts_of(back, SHARED), parts_of(pipe, SHARED))
    public = [{k: v for k, v in p.config.items() if not k.startswith("_")} for p in (first, back)]
    assert public[0] == public[1]
    assert torch.equal(draw(back), draw(first))
    again = ours.from_pipe(back, **added, **further(ours, controlnet))
    assert torch.equal(draw(again), draw(made))


def test_nothing_is_cast_unless_it_is_asked_for(pipe):
    pipe.branch.half()
    made = BridgeImg2ImgPipeline.from_pipe(pipe)
    assert [made.branch.dtype, made.unet.dtype] == [torch.float16, torch.float32]
    made = BridgeImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert {made.branch.dtype, made.unet.dtype, made.native_text_encoder.dtype} == {torch.bfloat16}


def test_other_parts(pipe):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    ).eval()
    other = make_branch(pipe.unet)
    made = BridgePipeline.from_pipe(pipe, branch=other, vae=tiny, native_text_encoder=None)
    assert made.branch is other
    assert made.native_text_encoder is None
    assert BridgeImg2ImgPipeline.from_pipe(made).vae is tiny


def test_what_is_known_without_a_text_encoder_goes_along(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    spared = BridgePipeline.from_pretrained(tmp_path, english=False)
    made = BridgeImg2ImgPipeline.from_pipe(spared)
    whole = BridgeImg2ImgPipeline.from_pipe(BridgePipeline.from_pretrained(tmp_path))
    assert torch.equal(draw(made), draw(whole))


def test_what_does_not_go_is_said_in_one_line(pipe):
    adapter = MotionAdapter(
        block_out_channels=(16, 16, 32, 32), motion_num_attention_heads=2, motion_norm_num_groups=8
    )
    moving = AnimateDiffPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, UNetMotionModel.from_unet2d(pipe.unet, adapter), adapter,
        pipe.scheduler,
    )  # fmt: skip
    wider = make_unet(block_out_channels=(16, 16, 16, 16))
    for source, changes, message in (
        (stock(pipe), {}, "BridgePipeline.from_pipe: a StableDiffusionPipeline has no branch; give branch="),
        (pipe, dict(brunch=1), "takes no 'brunch'; did you mean branch?"),
        (pipe, dict(torch_dtype="fp17"), "'fp17' is no dtype"),
        (pipe, dict(custom_pipeline="x"), "does not do custom_pipeline"),
        (pipe.unet, {}, "a UNet2DConditionModel is no pipeline of diffusers"),
        (moving, dict(branch=pipe.branch), "the unet of AnimateDiffPipeline is a UNetMotionModel"),
        (stock(pipe, unet=wider), dict(branch=pipe.branch), "block_out_channels"),
    ):
        with pytest.raises(UserError) as refused:
            BridgePipeline.from_pipe(source, **changes)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


AUTO = {
    AutoPipelineForText2Image: BridgePipeline,
    AutoPipelineForImage2Image: BridgeImg2ImgPipeline,
    AutoPipelineForInpainting: BridgeInpaintPipeline,
}


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize("source", KINDS)
def test_auto_pipelines_from_ours(pipe, controlnet, auto, source):
    first = source.from_pipe(pipe, **further(source, controlnet))
    if source is BridgeControlNetPipeline and auto is not AutoPipelineForText2Image:
        with pytest.raises(ValueError, match="AutoPipeline can't find"):  # there is no such pipeline
            auto.from_pipe(first)
        return
    made = auto.from_pipe(first)
    assert same(parts_of(made, OURS), parts_of(pipe, OURS))
    assert type(made) is (source if source is BridgeControlNetPipeline else AUTO[auto])


def test_auto_pipelines_from_a_folder(pipe, controlnet, tmp_path):
    pipe.save_pretrained(tmp_path)
    for auto, kind in AUTO.items():
        assert type(auto.from_pretrained(tmp_path)) is kind
    made = AutoPipelineForText2Image.from_pretrained(tmp_path, controlnet=controlnet)
    assert type(made) is BridgeControlNetPipeline
    assert made.controlnet is controlnet
    assert type(AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)) is BridgeControlNetPipeline


def test_auto_pipelines_that_are_imported_later():
    """Here they were imported first. They are slow to import, so our pipelines do not do so themselves."""
    code = """
import sys, bdm.pipeline
assert "diffusers.pipelines.auto_pipeline" not in sys.modules
from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING as table, __file__
assert table["bridge"] is bdm.pipeline.BridgeInpaintPipeline
assert __file__.endswith("auto_pipeline.py")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
