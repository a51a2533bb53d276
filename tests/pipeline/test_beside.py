"""Several branches on one backbone."""

import pytest
import torch
from tiny import make_branch

from bdm import Bridge, BridgePipeline, NativeCondition
from bdm.errors import UserError

DRAW = dict(num_inference_steps=2, guidance_scale=3.0, seed=1, output_type="pt")


@pytest.fixture
def two(pipe):
    """The pipeline with a copy of its own branch, and with another one, beside it."""
    pipe.add_branch("again", pipe.branch, pipe.native_text_encoder)
    torch.manual_seed(11)
    pipe.add_branch("other", make_branch(pipe.unet), pipe.native_text_encoder)
    return pipe


def draw(pipe, prompt="龙", **changes):
    return pipe(prompt, **DRAW | changes).images


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


def test_two_halves_of_one_branch_are_the_branch(two):
    close(draw(two, branch_scale=0.5, beside={"again": {"prompt": "龙", "scale": 0.5}}), draw(two))
    close(draw(two, branch_scale=0.0, beside={"again": "龙"}), draw(two))


def test_each_is_told_its_own_text(two):
    both = draw(two, beside={"other": "红灯笼"})
    assert not torch.allclose(both, draw(two), atol=1e-3)
    assert not torch.allclose(both, draw(two, beside={"other": "龙"}), atol=1e-4)
    close(draw(two, beside={"other": {"prompt": "红灯笼", "scale": 0.0}}), draw(two))


def test_who_is_told_nothing_is_silent_bit_for_bit(two, pipe):
    alone = draw(two)
    two.remove_branch("other")
    two.remove_branch("again")
    assert torch.equal(draw(pipe), alone)


def test_their_order_does_not_matter_and_prompts_keep_their_rows(two):
    told = {"again": ["月饼", "龙"], "other": {"prompt": ["红灯笼", "粽子"], "scale": 0.7}}
    pair = draw(two, ["龙", "月饼"], beside=told)
    close(draw(two, ["龙", "月饼"], beside=dict(reversed(told.items()))), pair)
    second = {"again": "龙", "other": {"prompt": "粽子", "scale": 0.7}}
    close(draw(two, "月饼", seed=2, beside=second), pair[1:])


def test_longer_prompts_beside_are_drawn_apart(two):
    long = "很长的一句话" * 20
    pair = draw(two, ["龙", "月饼"], beside={"other": ["红灯笼", long]})
    close(draw(two, "龙", beside={"other": "红灯笼"}), pair[:1])


@pytest.mark.parametrize("changes", [{}, {"prompt_en": "a cat", "english_guidance": 2.0}])
def test_savings_change_nothing_and_windows_are_each_ones_own(two, changes):
    told = {"other": {"prompt": "红灯笼", "start": 0.5}}
    shared, plain = (draw(two, beside=told, share=share, **changes) for share in (True, False))
    close(shared, plain)
    assert not torch.allclose(plain, draw(two, beside={"other": "红灯笼"}, **changes), atol=1e-4)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"none": "龙"}, "no branch is called 'none'"),
        ({"other": {"prompt": "龙", "strength": 1}}, "'strength' is not known"),
        ({"other": ["龙", "龙"]}, "2 texts for 1 prompts"),
        ({"other": {"scale": float("nan")}}, "not a finite number"),
        ({"other": {"start": 0.9, "end": 0.1}}, "both must lie in"),
        ("龙", "by the names of branches"),
    ],
)
def test_what_cannot_be_told(two, beside, said):
    with pytest.raises(UserError, match=said):
        draw(two, beside=beside)


def test_other_pipelines_around_the_same_parts_have_them_too(two):
    other = BridgePipeline.from_pipe(two)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, beside={"other": "红灯笼"}), draw(two, beside={"other": "红灯笼"}))
    other.remove_branch("other")
    assert "other" in two.voices


def test_what_cannot_be_put_beside(two):
    with pytest.raises(UserError, match="cannot be called 'other'"):
        two.add_branch("other", two.branch, two.native_text_encoder)
    with pytest.raises(UserError, match="no branch is called"):
        two.remove_branch("none")
    with pytest.raises(UserError, match="a NoneType is no NativeTextEncoder"):
        two.add_branch("mute", two.branch, None)
    with pytest.raises(UserError, match="a UNet2DConditionModel is no BranchModel"):
        two.add_branch("mute", two.unet, two.native_text_encoder)
    assert list(two.voices) == ["again", "other"]


def test_a_bridge_wants_a_condition_for_each_branch(pipe):
    features = pipe.native_text_encoder.encode(["龙"])
    bridge = Bridge(pipe.branch, beside=[pipe.branch]).attach(pipe.unet)
    with (
        pytest.raises(UserError, match="2 branches and is given 1"),
        bridge.condition(NativeCondition(features)),
    ):
        pass
    both = pipe.native_text_encoder.encode(["龙", "月饼"])
    with (
        pytest.raises(UserError, match="of 1 and 2 samples"),
        bridge.condition(NativeCondition(features), NativeCondition(both)),
    ):
        pass
    bridge.detach()
