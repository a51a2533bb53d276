"""Shared work: the same picture from fewer operations."""

import pytest
import torch
from community_files import make_controlnet
from diffusers.hooks import HookRegistry
from torch.utils.flop_counter import FlopCounterMode

from bdm.method.bridge import Bridge, NativeCondition
from bdm.speed.sharing import KeptProjection, RowPlan

CALLS = {
    "empty English": {},
    "two prompts, two pictures each": dict(prompt=["龙", "红灯笼"], num_images_per_prompt=2),
    "English negative": dict(negative_prompt_en="ugly"),
    "English equal in one of two": dict(prompt=["龙", "月饼"], prompt_en=["", "a cat"]),
    "no guidance": dict(guidance_scale=1.0),
    "window": dict(branch_start=0.3, branch_end=0.7, num_inference_steps=5),
    "stochastic": dict(eta=0.7),
}
#: Of the operations without sharing; what is left is the decoder, the branch, and the distinct rows of the
#: encoder.
AT_MOST = {"empty English": 0.85, "two prompts, two pictures each": 0.85, "English equal in one of two": 0.95}


def draw(pipe, share, **changes):
    settings = (
        dict(prompt="龙", num_inference_steps=3, guidance_scale=5.0, seed=1, output_type="latent") | changes
    )
    with FlopCounterMode(display=False) as counter:
        picture = pipe(**settings, share=share).images
    return picture, counter.get_total_flops()


@pytest.mark.parametrize("case", CALLS)
def test_picture_is_the_same_and_work_is_less(pipe, case):
    plain, all_flops = draw(pipe, False, **CALLS[case])
    shared, flops = draw(pipe, True, **CALLS[case])
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-4)
    assert flops <= all_flops * AT_MOST.get(case, 1.0)
    again, _ = draw(pipe, False, **CALLS[case])
    assert torch.equal(again, plain), "nothing stays behind"


def test_with_plugins(pipe, tmp_path):
    make_controlnet(pipe.unet).save_pretrained(tmp_path / "edges")
    pipe.plugins.attach(tmp_path / "edges", strength=0.7)
    control = dict(control_images=torch.rand(1, 3, 64, 64))
    plain, all_flops = draw(pipe, False, **control)
    shared, flops = draw(pipe, True, **control)
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-4)
    assert flops < 0.9 * all_flops


@torch.no_grad()
def test_kept_projections_follow_weights_and_features():
    """Of memory that is used again, of features changed in place, of features that are others."""
    layer, features = torch.nn.Linear(64, 64, bias=False), torch.randn(1, 2, 64)
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(KeptProjection(), "kept")

    def check():
        torch.testing.assert_close(layer(features), torch.nn.functional.linear(features, layer.weight))

    for swaps in (1, 2, 3) * 7:
        for _ in range(swaps):
            layer.weight.data = torch.empty(0)
            layer.weight.data = torch.randn(64, 64)
        check()
    assert layer(features) is layer(features)
    features.mul_(2)
    check()
    features = features[:, :1]
    check()
    layer.weight.data = layer.weight.data.repeat(2, 1)
    check()
    layer.weight.data = layer.weight.data[::2]
    check()
    for _ in range(20):
        del features
        features = torch.randn(1, 2, 64)
        check()


def test_encoder_sees_distinct_rows_only(pipe):
    seen = []
    block = pipe.unet.down_blocks[1].resnets[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    draw(pipe, True, prompt=["龙", "月饼"])
    assert set(seen) == {2}
    seen.clear()
    draw(pipe, True, prompt=["龙", "月饼"], prompt_en=["", "a cat"])
    assert set(seen) == {3}
    handle.remove()


def test_weights_changed_between_calls_count(pipe):
    """Kept projections are those of one call: a bridge that stays attached sees what an adapter changes."""
    bridge = Bridge(pipe.branch).attach(pipe.unet)
    condition = NativeCondition(torch.randn(1, 52, 48), torch.randn(1, 52, 48))
    x, text = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(1, 77, 32).repeat(2, 1, 1)

    @torch.no_grad()
    def run():
        with bridge.condition(condition):
            return pipe.unet(x, 500, text).sample

    first = run()
    assert torch.equal(run(), first)
    weight = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    weight.data = weight.data * 3
    assert not torch.allclose(run(), first)
    bridge.detach()


def test_plan_selects_and_spreads():
    plan = RowPlan()
    latents = torch.randn(3, 4, 2, 2).repeat(2, 1, 1, 1)
    text = torch.randn(6, 5, 8)
    text[4] = text[1]
    plan.find(latents, text)
    assert plan.rows.tolist() == [0, 1, 2, 3, 5]
    assert plan.back.tolist() == [0, 1, 2, 3, 1, 4]
    values = torch.randn(6, 7)
    values[4] = values[1]
    assert torch.equal(plan.spread(plan.select(values)), values)
    assert plan.select(text) is plan.select(text), "one tensor, so that projections of it are kept"
    plan.find(latents, torch.randn(6, 5, 8))
    assert plan.rows is None


def test_training_shares_nothing(pipe):
    """Gradients reach the branch through every row."""
    bridge = Bridge(pipe.branch.requires_grad_(True)).attach(pipe.unet)
    x, text = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(1, 77, 32).repeat(2, 1, 1)
    with bridge.condition(NativeCondition(torch.randn(1, 52, 48), torch.randn(1, 52, 48))):
        pipe.unet(x, 500, text).sample.square().mean().backward()
    gradient = pipe.branch.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad
    assert gradient.abs().sum() > 0
    bridge.detach()
