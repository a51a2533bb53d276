"""Shared work: the same picture from fewer operations."""

import threading
from contextlib import ExitStack

import pytest
import torch
from community_files import make_controlnet
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bdm import Bridge, NativeCondition
from bdm.speed.rows import DistinctRows, Rows
from bdm.speed.sharing import KeptProjections, SharedRows, Vouched, _distinct

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


def rows_seen(monkeypatch):
    """Batch sizes that the second encoder block's first residual block computes.

    Not by a hook: then the plain way would be taken.
    """
    seen, compute = [], ResnetBlock2D.forward

    def counted(module, x, *rest, **others):
        seen.append((id(module), len(x)))
        return compute(module, x, *rest, **others)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    return lambda module: [rows for one, rows in seen if one == id(module)]


def test_encoder_sees_distinct_rows_only(pipe, monkeypatch):
    seen = rows_seen(monkeypatch)
    block = pipe.unet.down_blocks[1].resnets[0]
    draw(pipe, True, prompt=["龙", "月饼"])
    assert set(seen(block)) == {2}
    draw(pipe, True, prompt=["龙", "月饼"], prompt_en=["", "a cat"])
    assert set(seen(block)[3:]) == {3}
    handle = block.register_forward_hook(lambda *_: None)
    draw(pipe, True, prompt=["龙", "月饼"])
    assert set(seen(block)[6:]) == {4}, "somebody else's hook sees the whole batch"
    handle.remove()


def test_keys_and_values_are_computed_once_a_call(pipe, monkeypatch):
    layer = pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    calls, compute = [], nn.functional.linear

    def counted(x, weight, bias=None):
        calls.extend([1] * (weight is layer.weight))
        return compute(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    draw(pipe, True)
    assert len(calls) == 1
    draw(pipe, False)
    assert len(calls) == 4
    draw(pipe, True, callback_on_step_end=lambda pipe, i, t, tensors: tensors)
    assert len(calls) == 7, "a callback may change the weights"


def test_stock_pipelines_keep_nothing_between_steps(pipe):
    """Nobody tells what runs between their steps; halves are still shared within each."""
    bridge = Bridge(pipe.branch)
    assert [type(helper) for helper in bridge.helpers] == [SharedRows]
    assert any(
        isinstance(helper, KeptProjections)
        for helper in Bridge(pipe.branch, vouched=Vouched(undisturbed=True)).helpers
    )
    assert Bridge(pipe.branch, share=False).helpers == ()


@pytest.mark.parametrize("name", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
def test_an_adapters_residuals_switch_sharing_off(pipe, monkeypatch, name):
    """A T2I-adapter's (the second name is their old form): they may make the halves differ."""
    seen = rows_seen(monkeypatch)
    block = pipe.unet.down_blocks[1].resnets[0]
    x, text = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(1, 77, 32).repeat(2, 1, 1)
    condition = NativeCondition(torch.randn(1, 52, 48), torch.randn(1, 52, 48))
    shapes = ((2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2), (2, 32, 1, 1))
    adapted = {name: [torch.randn(shape) for shape in shapes]}

    @torch.no_grad()
    def run(share, **residuals):
        bridge = Bridge(pipe.branch, share).attach(pipe.unet)
        with bridge.condition(condition):
            result = pipe.unet(x, 500, text, **{key: list(value) for key, value in residuals.items()}).sample
        bridge.detach()
        return result

    plain = run(share=False, **adapted)
    torch.testing.assert_close(run(share=True, **adapted), plain, atol=1e-5, rtol=3e-5)
    assert seen(block) == [2, 2]
    assert (plain - run(share=True)).abs().max() > 0.1
    assert seen(block) == [2, 2, 1], "without them it is shared"


def test_weights_changed_between_calls_count(pipe):
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


def test_rows_select_and_spread():
    text = torch.randn(3, 5, 8).repeat(2, 1, 1)
    text[3], text[5] = torch.randn(2, 5, 8)
    rows = _distinct(text, 2)
    assert rows.chosen.tolist() == [0, 1, 2, 3, 5]
    assert rows.back.tolist() == [0, 1, 2, 3, 1, 4]
    values = torch.randn(6, 7)
    values[4] = values[1]
    assert torch.equal(rows.spread(rows.select(values)), values)
    assert _distinct(torch.randn(6, 5, 8), 2) is None
    half = Rows.part(4, 1, 2, "cpu")
    assert torch.equal(half.spread(half.select(values[:4])), values[[2, 3, 2, 3]])


def test_rows_are_those_of_one_thread():
    """A branch may be at work for another pipeline meanwhile."""
    branch_part = nn.Linear(3, 3)
    with ExitStack() as stack:
        distinct = DistinctRows()
        distinct.hang(stack, [branch_part])
        distinct.set(Rows.part(4, 0, 2, "cpu"))
        x = torch.randn(4, 3)
        shared = branch_part(x)
        assert torch.equal(shared[:2], shared[2:])
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(branch_part(x)))
        thread.start()
        thread.join()
        assert not torch.equal(elsewhere[0][:2], elsewhere[0][2:])
    assert not branch_part._forward_hooks
    assert not branch_part._forward_pre_hooks


def test_training_shares_nothing(pipe):
    """Gradients reach the branch through every row."""
    bridge = Bridge(pipe.branch.requires_grad_(True)).attach(pipe.unet)
    x, text = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(1, 77, 32).repeat(2, 1, 1)
    with bridge.condition(NativeCondition(torch.randn(1, 52, 48), torch.randn(1, 52, 48))):
        pipe.unet(x, 500, text).sample.square().mean().backward()
    gradient = pipe.branch.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad
    assert gradient.abs().sum() > 0
    bridge.detach()
