import pytest
import torch
from agreement import outputs_agree
from diffusers import ControlNetModel
from tiny import NATIVE_DIM, TEXT_DIM, make_branch, make_unet

from bdm import Bridge, NativeCondition
from bdm.errors import UserError
from bdm.method.branch import BranchModel


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor(300), torch.randn(2, 7, TEXT_DIM)


def condition(**changes):
    generator = torch.Generator().manual_seed(5)
    positive, negative = torch.randn(2, 9, NATIVE_DIM, generator=generator).split(1)
    return NativeCondition(positive, negative, **changes)


def run(unet, inputs, **more):
    x, t, text = inputs
    return unet(x, t, text, **more).sample


def test_fresh_branch_leaves_outputs_bit_identical(unet, inputs):
    bare = run(unet, inputs)
    bridge = Bridge(BranchModel.from_backbone(unet, NATIVE_DIM)).attach(unet)
    with bridge.condition(condition()):
        assert torch.equal(run(unet, inputs), bare)


def test_detach_restores_bit_for_bit_and_scale_0_is_off(unet, branch, inputs):
    bare = run(unet, inputs)
    for _ in range(3):
        bridge = Bridge(branch).attach(unet)
        assert torch.equal(run(unet, inputs), bare), "attached without a condition"
        with bridge.condition(condition()):
            assert not torch.allclose(run(unet, inputs), bare, atol=1e-3)
        with bridge.condition(condition(scale=0.0)):
            assert torch.equal(run(unet, inputs), bare)
        bridge.detach()
        assert torch.equal(run(unet, inputs), bare)


def test_halves_are_negative_then_positive_and_add_to_controlnets(unet, branch, inputs):
    x, t, text = inputs
    cond = condition(scale=0.6)
    controlnet = ControlNetModel.from_unet(unet).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)
    down, middle = controlnet(x, t, text, torch.randn(2, 3, 64, 64), return_dict=False)
    own_down, own_middle = branch(x, t, torch.cat([cond.negative, cond.positive]), 0.6, return_dict=False)
    expected = unet(
        x, t, text, down_block_additional_residuals=[a + b for a, b in zip(down, own_down, strict=True)],
        mid_block_additional_residual=middle + own_middle,
    ).sample  # fmt: skip
    bridge = Bridge(branch).attach(unet)
    with bridge.condition(cond):
        ours = run(unet, inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    outputs_agree(ours, expected)


def test_window_is_the_official_one(unet, branch, inputs):
    bridge = Bridge(branch).attach(unet)
    x, _, text = inputs
    timesteps = [torch.tensor(901 - 100 * i) for i in range(10)]
    bare = [run(unet, (x, t, text)) for t in timesteps]
    with bridge.condition(condition(start=0.25, end=0.8, steps=lambda: 10)):
        acting = [
            not torch.equal(run(unet, (x, t, text)), plain) for t, plain in zip(timesteps, bare, strict=True)
        ]
    # off where i/T < start or (i+1)/T > end
    assert acting == [False, False, False, True, True, True, True, True, False, False]


def test_only_the_branch_receives_gradients(unet, branch):
    # Of 16x16 latents the middle has 2x2: attention over a single position has no gradient.
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(300), torch.randn(2, 7, TEXT_DIM)
    branch.requires_grad_(True)
    bridge = Bridge(branch).attach(unet)
    with bridge.condition(condition()):
        run(unet, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
    assert all(p.grad is None for p in unet.parameters())


def test_what_does_not_fit_is_refused_and_leaves_no_hook(unet, branch, inputs):
    before = run(unet, inputs)
    with pytest.raises(
        UserError,
        match=r"block_out_channels \(16, 16, 32, 32\) does not fit the backbone's \(16, 16, 16, 16\)",
    ):
        Bridge(branch).attach(make_unet(block_out_channels=(16, 16, 16, 16)))
    bridge = Bridge(branch).attach(unet)
    with pytest.raises(UserError, match="has a bridge already"):
        Bridge(make_branch(unet)).attach(unet)
    with (
        pytest.raises(UserError, match=r"shape \(1, 9, 5\) and the branch reads"),
        bridge.condition(NativeCondition(torch.zeros(1, 9, 5))),
    ):
        pass
    bridge.detach()
    assert torch.equal(run(unet, inputs), before)
