"""Approximate modes: what they leave out, and that it is nothing else."""

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from tiny import NATIVE_DIM, TEXT_DIM
from torch.utils.flop_counter import FlopCounterMode

from bdm import Bridge, NativeCondition
from bdm.errors import UserError
from bdm.speed.approximate import Approximation


@dataclass
class Drawn:
    latents: torch.Tensor
    flops: int


def draw(pipe, approximation=None, **changes):
    settings = (
        dict(prompt="龙", num_inference_steps=4, guidance_scale=5.0, seed=1, output_type="latent") | changes
    )
    with FlopCounterMode(display=False) as counter:
        latents = pipe(**settings, approximation=approximation or Approximation()).images
    return Drawn(latents, counter.get_total_flops())


@pytest.mark.parametrize("share", [True, False])
def test_empty_guidance_interval_is_guidance_scale_1(pipe, share):
    unguided = draw(pipe, guidance_scale=1.0, share=share)
    left_out = draw(pipe, Approximation(guidance_start=1.0), share=share)
    torch.testing.assert_close(left_out.latents, unguided.latents, atol=1e-5, rtol=1e-4)
    assert left_out.flops == pytest.approx(unguided.flops, rel=0.02)


def test_guidance_interval_changes_the_scale_at_its_steps(pipe):
    """Against the stock pipeline whose guidance scale a callback sets to 1 in the first half."""
    expected = draw(
        pipe,
        callback_on_step_end=lambda p, i, t, kwargs: setattr(p, "_guidance_scale", 5.0) or kwargs,
        share=False,
    )
    assert torch.equal(expected.latents, draw(pipe, share=False).latents)

    def scale_of_next_step(p, i, t, kwargs):
        p._guidance_scale = 5.0 if i + 1 < 2 else 1.0 + 1e-9  # just above 1: both halves are still computed
        return kwargs

    expected = draw(pipe, callback_on_step_end=scale_of_next_step)
    ours = draw(pipe, Approximation(guidance_end=0.5))
    torch.testing.assert_close(ours.latents, expected.latents, atol=1e-4, rtol=1e-4)
    assert ours.flops < 0.9 * expected.flops


@torch.no_grad()
def test_branch_residuals_are_added_again(unet, branch):
    positive, negative = torch.randn(2, 9, NATIVE_DIM).split(1)
    text = torch.randn(2, 7, TEXT_DIM)
    samples = [torch.randn(2, 4, 8, 8) for _ in range(5)]
    expected = []
    for i, x in enumerate(samples):
        if i % 2 == 0:
            down, middle = branch(
                x, torch.tensor(300 - i), torch.cat([negative, positive]), return_dict=False
            )
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        expected.append(unet(x, torch.tensor(300 - i), text, **residuals).sample)
    bridge = Bridge(branch, approximation=Approximation(branch_every=2)).attach(unet)
    with bridge.condition(NativeCondition(positive, negative)):
        for i, x in enumerate(samples):
            torch.testing.assert_close(
                unet(x, torch.tensor(300 - i), text).sample, expected[i], atol=1e-5, rtol=1e-4
            )
    bridge.detach()


@torch.no_grad()
def test_deep_features_are_used_again_and_shallow_ones_are_not(unet, branch, monkeypatch):
    positive, negative = torch.randn(2, 9, NATIVE_DIM).split(1)
    text = torch.randn(2, 7, TEXT_DIM)
    x, other = torch.randn(2, 2, 4, 8, 8)
    counts = {name: [] for name in ("shallow", "deep", "branch_deep")}
    watched = dict(
        shallow=unet.up_blocks[-1].resnets[0],
        deep=unet.up_blocks[1].resnets[0],
        branch_deep=branch.down_blocks[1].resnets[0],
    )
    compute = ResnetBlock2D.forward

    def counted(module, *args, **kwargs):
        for name, one in watched.items():
            counts[name] += [1] * (one is module)
        return compute(module, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    bridge = Bridge(branch, approximation=Approximation(deep_every=3)).attach(unet)
    with bridge.condition(NativeCondition(positive, negative)):
        full = unet(x, 300, text).sample
        again = unet(x, 299, text).sample
        changed = unet(other, 298, text).sample
        fresh = unet(other, 297, text).sample  # the fourth step
    bridge.detach()
    assert len(counts["shallow"]) == 4
    assert len(counts["deep"]) == len(counts["branch_deep"]) == 2
    assert (again - full).abs().max() < 0.1 * (changed - full).abs().max()
    assert not torch.allclose(changed, full, atol=1e-3), "the outermost block sees the new sample"
    assert not torch.allclose(changed, fresh, atol=1e-3), "what lies deeper does not"


def test_features_are_not_used_again_for_other_work(pipe):
    """A window of the branch and an interval of guidance change what a step computes.

    Deep features of before do not fit it.
    """
    everything = Approximation(guidance_start=0.3, guidance_end=0.7, branch_every=3, deep_every=3)
    ours = draw(
        pipe,
        everything,
        branch_end=0.8,
        num_inference_steps=6,
        prompt=["龙", "月饼"],
        num_images_per_prompt=2,
    )
    assert torch.isfinite(ours.latents).all()
    exact = draw(pipe, branch_end=0.8, num_inference_steps=6, prompt=["龙", "月饼"], num_images_per_prompt=2)
    assert ours.flops < 0.7 * exact.flops
    assert torch.equal(draw(pipe).latents, draw(pipe, Approximation()).latents), "nothing stays behind"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(guidance_start=-0.1),
        dict(guidance_start=0.8, guidance_end=0.2),
        dict(branch_every=0),
        dict(deep_every=0),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)) if "every" in next(iter(wrong)) else "interval"):
        Approximation(**wrong)


def turned(in_place):
    """A callback that changes the English features half-way, in their own memory or in another."""

    def callback(pipe, i, t, kwargs):
        if i == 1:
            text = kwargs["prompt_embeds"]
            kwargs["prompt_embeds"] = text.neg_() if in_place else -text
        return kwargs

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "prompt_en": "a cat",
    }


@pytest.mark.parametrize("changes", [{}, {"english_guidance": 2.0}])
@pytest.mark.parametrize("interval", [(0.0, 0.25), (0.75, 1.0), (0.0, 1.0)])
def test_a_callback_may_write_into_the_texts(pipe, interval, changes):
    ours, expected = (draw(pipe, Approximation(*interval), **changes, **turned(how)) for how in (True, False))
    assert torch.equal(ours.latents, expected.latents)
    assert not torch.allclose(
        ours.latents, draw(pipe, Approximation(*interval), prompt_en="a cat", **changes).latents, atol=1e-3
    )


@pytest.mark.parametrize("mode", [{"branch_every": 2}, {"deep_every": 2}])
def test_a_branch_that_is_told_two_texts_has_two_results(pipe, mode):
    """Each text's own are used again, whichever is told first."""
    pipe.add_branch("again", pipe.branch, pipe.native_text_encoder)
    told = {"again": "红灯笼"}
    first = draw(pipe, Approximation(**mode), beside=told)
    swapped = draw(pipe, Approximation(**mode), prompt="红灯笼", beside={"again": "龙"})
    torch.testing.assert_close(first.latents, swapped.latents, atol=1e-4, rtol=1e-4)
    exact = draw(pipe, beside=told)
    off = draw(pipe, beside={"again": {"prompt": "红灯笼", "scale": 0.0}})
    error, all_of_it = ((d.latents - exact.latents).abs().max() for d in (first, off))
    assert error < 0.5 * all_of_it


@pytest.mark.parametrize(
    "what", [{"branch_every": "2"}, {"deep_every": 1.5}, {"guidance_start": "0"}, {"guidance_end": None}]
)
def test_what_is_no_number_is_said(what):
    with pytest.raises(UserError):
        Approximation(**what)
