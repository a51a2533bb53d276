"""Prompts that change from step to step, and that AND joins: the pipeline against a loop written out."""

import logging

import pytest
import torch

from bdm import BridgeControlNetPipeline, BridgeImg2ImgPipeline, PromptRules
from bdm.errors import UserError
from bdm.method.bridge import Bridge
from bdm.method.condition import NativeCondition
from bdm.speed.approximate import Approximation

STEPS, GUIDANCE = 4, 3.0
DRAW = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=5, output_type="latent")


@torch.no_grad()
def by_hand(pipe, told):
    """Latents of a loop over steps; ``told(i)`` gives [(native, English, weight), ...]."""
    texts = {pair for i in range(STEPS) for pair in (("", "", 0), *told(i))}
    native = {n: pipe.native_text_encoder.encode([n])[0] for n, _, _ in texts}
    english = {e: pipe._encode_english([e], 1)[0] for _, e, _ in texts}
    pipe.scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * pipe.scheduler.init_noise_sigma
    bridge = Bridge(pipe.branch).attach(pipe.unet)

    def eps(n, e, t):
        with bridge.condition(NativeCondition(native[n][None])):
            return pipe.unet(x, t, english[e][None]).sample

    for i, t in enumerate(pipe.scheduler.timesteps):
        nothing = eps("", "", t)
        pulls = [w * (eps(n, e, t) - nothing) for n, e, w in told(i)]
        x = pipe.scheduler.step(nothing + GUIDANCE * sum(pulls), t, x).prev_sample
    bridge.detach()
    return x


def lanterns(i):
    return [(f"{'红灯笼' if i < 2 else '月饼'}，蓝色背景", "", 1)]


def joined(i):
    first = "龙 " if i < 2 else "鸟 "
    return [(first, "cat ", 1), (" 虎", " " if i < 2 else " dog", 1)]


CASES = {
    "native words": ("[红灯笼:月饼:0.5]，蓝色背景", "", lanterns),
    "English words": ("龙", "a [cat:dog:3]", lambda i: [("龙", "a cat" if i < 3 else "a dog", 1)]),
    "both in turn": ("[龙|虎]", "[cat||dog]", lambda i: [("龙虎"[i % 2], ("cat", "", "dog")[i % 3], 1)]),
    "joined": ("龙 AND 虎 :0.5", "", lambda i: [("龙 ", "", 1), (" 虎 ", "", 0.5)]),
    "joined in both": (
        "龙 :2 AND 虎", "cat AND dog :-0.3", lambda i: [("龙 ", "cat ", 2), (" 虎", " dog ", -0.3)]
    ),
    "joined, English once": ("龙 AND 虎", "cat", lambda i: [("龙 ", "cat", 1), (" 虎", "cat", 1)]),
    "joined and scheduled": ("[龙:鸟:2] AND 虎", "cat AND [dog:2]", joined),
    "a weight alone": ("龙", "cat :0.5", lambda i: [("龙", "cat ", 0.5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_step_is_told_its_own_words(pipe, name):
    native, english, told = CASES[name]
    found = pipe(native, prompt_en=english, share="joined" in name, **DRAW).images
    torch.testing.assert_close(found, by_hand(pipe, told), atol=1e-4, rtol=1e-4)
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


def test_by_the_official_rules_it_is_text(pipe):
    official = PromptRules(emphasis="official", chunks="official")
    found = pipe("龙 AND 虎", prompt_en="a [cat:dog:3]", prompt_rules=official, **DRAW).images
    assert not torch.allclose(found, pipe("龙 AND 虎", prompt_en="a [cat:dog:3]", **DRAW).images, atol=1e-3)


def test_prompts_of_unlike_structure_are_drawn_apart(pipe):
    prompts = ["龙", "[龙:虎:2]", "龙 AND 虎", "[虎:龙:2]"]
    together = pipe(prompts, prompt_en=["", "cat", "", "cat"], **DRAW).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, prompt_en="cat" if i % 2 else "", **DRAW | {"seed": 5 + i}).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_negative_prompts_are_scheduled_and_joined_by_nothing(pipe):
    call = dict(prompt="龙", **DRAW)
    turned = pipe(negative_prompt="[猫:猫:0.5]", negative_prompt_en="[bad|bad]", **call).images
    torch.testing.assert_close(
        turned, pipe(negative_prompt="猫", negative_prompt_en="bad", **call).images, atol=1e-4, rtol=1e-4
    )
    joined = pipe(negative_prompt="猫 AND 狗", **call).images
    assert not torch.allclose(joined, pipe(negative_prompt="猫", **call).images, atol=1e-3)


def test_native_emphasis_has_an_effect_in_the_working_mode_alone(pipe):
    plain, weighed, full = (pipe(p, **DRAW).images for p in ("红灯笼", "红(灯笼:1.5)", "红（灯笼：1.5）"))
    assert torch.equal(weighed, full)
    assert not torch.allclose(plain, weighed, atol=1e-3)
    official = PromptRules(emphasis="official")
    assert torch.equal(pipe("红(灯笼:1.5)", prompt_rules=official, **DRAW).images, plain)


def test_control_nets_see_the_words_of_the_step(pipe, files):
    """A plug-in's residuals are those of the English text of each part."""
    pipe.plugins.attach(files["edges"])
    call = dict(**DRAW, control_images=torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    turned = pipe("龙", prompt_en="[cat:dog:0]", **call).images
    torch.testing.assert_close(turned, pipe("龙", prompt_en="dog", **call).images, atol=1e-4, rtol=1e-4)
    scheduled = pipe("龙", prompt_en="[cat:dog:2]", **call).images
    assert not torch.allclose(scheduled, turned, atol=1e-4)
    twice = pipe("龙 AND 龙", prompt_en="cat :0.25 AND cat :0.75", **call).images
    torch.testing.assert_close(twice, pipe("龙", prompt_en="cat", **call).images, atol=1e-4, rtol=1e-4)


def test_a_stock_control_net_sees_them_too(pipe, files):
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(pipe.unet)
    torch.nn.init.normal_(net.controlnet_mid_block.weight)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    stock = BridgeControlNetPipeline(**parts, controlnet=net)
    stock.set_progress_bar_config(disable=True)
    call = dict(**DRAW, image=torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    turned = stock("龙 AND 龙 :0", prompt_en="[cat:dog:0]", **call).images
    torch.testing.assert_close(turned, stock("龙", prompt_en="dog", **call).images, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="attach it as a plug-in"):
        stock("龙", prompt_en="cat AND dog", **call)


def test_pictures_to_start_from_have_fewer_steps(pipe):
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    again = BridgeImg2ImgPipeline(**parts)
    again.set_progress_bar_config(disable=True)
    call = dict(**DRAW, image=torch.zeros(1, 3, 64, 64), strength=0.5)
    first, second, both = (again(p, **call).images for p in ("龙", "虎", "[龙:虎:0.5]"))
    assert not torch.equal(both, first), "two of four steps are left, the second is told 虎"
    assert not torch.equal(both, second)


def test_adapters_in_prompts_have_their_strengths_for_the_call(pipe, files):
    pipe.plugins.attach(files["ink"])
    before = pipe("龙", prompt_en="cat", **DRAW).images
    named = pipe("龙 <lora:ink:0.3:0.6>", prompt_en="cat", **DRAW).images
    given = pipe("龙 ", prompt_en="cat", plugin_strength={"ink": (0.6, 0.3)}, **DRAW).images
    assert torch.equal(named, given)
    assert not torch.allclose(named, before, atol=1e-4)
    both = pipe(["龙 <lora:ink:0>", "龙"], prompt_en="cat", **DRAW).images
    assert torch.equal(pipe("龙", prompt_en="cat", **DRAW).images, before)
    assert both.shape[0] == 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (dict(prompt="龙 <lora:ink>"), "names the adapter 'ink', and attached are none"),
        (dict(prompt="龙 AND 虎", guidance_scale=1.0), "give a guidance_scale above 1"),
        (dict(prompt="龙 AND 虎", english_guidance=2.0), "english_guidance is asked for"),
        (dict(prompt="龙 AND 虎", approximation=Approximation(0.2, 0.8)), "a guidance interval is asked for"),
        (dict(prompt="龙 AND 虎", prompt_en="a AND b AND c"), "joins 2 native prompts and 3 English"),
        (dict(prompt="龙 <lora:a:1>", prompt_en="<lora:a:2>"), "name the adapter 'a' twice"),
    ],
)
def test_what_cannot_be_drawn_is_said(pipe, call, said):
    with pytest.raises(UserError, match=said):
        pipe(**DRAW | call)
    assert not pipe.unet._forward_pre_hooks


def test_words_for_the_english_side_are_told_there(pipe, caplog):
    with caplog.at_level(logging.WARNING, "bdm"):
        routed = pipe("masterpiece, 龙", **DRAW).images
    assert caplog.text.count("acting on the English side: masterpiece") == 1
    assert torch.equal(routed, pipe("龙", prompt_en="masterpiece", **DRAW).images)
    kept = pipe("masterpiece, 龙", prompt_rules=PromptRules(routing=False), **DRAW).images
    assert not torch.allclose(kept, routed, atol=1e-3)


def test_a_callbacks_features_and_changing_prompts_exclude_each_other(pipe):
    def says(pipe, i, t, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"].clone()}

    with pytest.raises(UserError, match="a callback put other English features"):
        pipe(
            "龙",
            prompt_en="[cat:dog:2]",
            callback_on_step_end=says,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            **DRAW,
        )
    assert not pipe.unet._forward_pre_hooks
