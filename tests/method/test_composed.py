"""Composed guidance against three separate passes, and as an option of the pipeline."""

import pytest
import torch

from bdm import BridgePipeline, NativeCondition
from bdm.errors import UserError
from bdm.method.bridge import Bridge
from bdm.method.composed import ComposedGuidance
from bdm.speed.approximate import Approximation

DRAW = dict(num_inference_steps=2, guidance_scale=4.0, seed=3, output_type="pt")


@pytest.fixture
def told(pipe):
    """Native and English features of [negative, positive] for two prompts."""
    native = [pipe.native_text_encoder.encode(texts) for texts in (["", ""], ["龙", "红灯笼"])]
    english = [pipe._encode_english(texts, 1) for texts in (["", ""], ["blue", "red"])]
    return native, english


@torch.no_grad()
def test_it_is_the_sum_of_two_differences(pipe, told):
    (no_native, native), (no_english, english) = told
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(500)

    def eps(native_text, english_text):
        bridge = Bridge(pipe.branch).attach(pipe.unet)
        try:
            with bridge.condition(NativeCondition(native_text)):
                return pipe.unet(x, t, english_text).sample
        finally:
            bridge.detach()

    nothing = eps(no_native, no_english)
    expected = eps(native, no_english) + 0.7 * (eps(no_native, english) - nothing)
    bridge = Bridge(pipe.branch, [ComposedGuidance(0.7)]).attach(pipe.unet)
    try:
        with bridge.condition(NativeCondition(native, no_native)):
            out = pipe.unet(torch.cat([x, x]), t, torch.cat([no_english, english])).sample
    finally:
        bridge.detach()
    torch.testing.assert_close(out, torch.cat([nothing, expected]), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, eps(native, english), atol=1e-3), "the joint score is another"


def test_without_an_english_prompt_it_is_the_papers(pipe):
    plain = pipe(["龙", "红灯笼"], **DRAW).images
    assert torch.equal(pipe(["龙", "红灯笼"], english_guidance=3.0, **DRAW).images, plain)


def test_an_english_prompt_that_a_callback_brings_counts(pipe):
    """Against one that says something from the first step on, where the callback's takes its place."""

    def says(pipe, i, t, kwargs):
        kwargs["prompt_embeds"] = torch.cat([kwargs["prompt_embeds"][:1], pipe._encode_english(["red"], 1)])
        return kwargs

    call = dict(
        callback_on_step_end=says, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **DRAW
    )
    drawn = [pipe("龙", english_guidance=strength, **call).images for strength in (4.0, 20.0)]
    assert not torch.allclose(*drawn, atol=1e-3)


@pytest.mark.parametrize("prompt_en", ["a cat", ["", "a cat"]])
def test_shared_rows_change_nothing(pipe, prompt_en):
    call = dict(prompt=["龙", "红灯笼"], prompt_en=prompt_en, english_guidance=3.0, num_images_per_prompt=2)
    shared, plain = (pipe(**call, **DRAW, share=share).images for share in (True, False))
    torch.testing.assert_close(shared, plain, atol=3e-5, rtol=0)
    assert not torch.allclose(plain, pipe(**call | {"english_guidance": None}, **DRAW).images, atol=1e-3)


def test_a_control_net_sees_the_english_of_each_part(pipe, files):
    """Its residuals belong to the part's English text; without its help nothing changes at strength 0."""
    pipe.plugins.attach(files["edges"])
    call = dict(prompt="龙", prompt_en="a cat", english_guidance=3.0, **DRAW)
    call["control_images"] = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    shared, plain = (pipe(**call, share=share).images for share in (True, False))
    torch.testing.assert_close(shared, plain, atol=3e-5, rtol=0)
    without = pipe(**call, plugin_strength={"edges": 0.0}).images
    assert not torch.allclose(without, plain, atol=1e-3)


def test_outside_of_a_guidance_interval_nothing_is_composed(pipe):
    call = dict(prompt="龙", prompt_en="a cat", **DRAW)
    never = Approximation(guidance_start=1.0, guidance_end=1.0)
    composed = pipe(**call, english_guidance=9.0, approximation=never).images
    torch.testing.assert_close(composed, pipe(**call, approximation=never).images, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("english_guidance", "guidance", "said"),
    [(2.0, 1.0, "raise it above 1"), (float("nan"), 4.0, "not a finite"), ("2", 4.0, "is no number")],
)
def test_what_cannot_be_composed(pipe, english_guidance, guidance, said):
    with pytest.raises(UserError, match=said):
        pipe("龙", prompt_en="a", english_guidance=english_guidance, **DRAW | {"guidance_scale": guidance})
    assert isinstance(pipe, BridgePipeline)
    assert not pipe.unet._forward_pre_hooks


@torch.no_grad()
def test_features_of_frames_are_refused(pipe, told):
    (no_native, native), (no_english, english) = told
    bridge = Bridge(pipe.branch, [ComposedGuidance(0.7)]).attach(pipe.unet)
    each_frame = torch.cat([no_english, english]).repeat_interleave(3, 0)
    with (
        pytest.raises(UserError, match="for each of the 4 samples"),
        bridge.condition(NativeCondition(native, no_native)),
    ):
        pipe.unet(torch.randn(4, 4, 8, 8), torch.tensor(500), each_frame)
    bridge.detach()
