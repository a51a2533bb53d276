"""How strong the branch is over the steps."""

import pytest
import torch
from agreement import outputs_agree

from bdm.errors import UserError
from bdm.method.schedule import Curve, Segments, read_schedule
from bdm.models.samplers import make_scheduler
from bdm.pipeline.world import settings_of
from bdm.speed.approximate import Approximation


def draw(pipe, **changes):
    settings = dict(seed=3, num_inference_steps=4, guidance_scale=3.0, output_type="latent")
    return pipe("红灯笼", **settings | changes).images


def scales_of(pipe, steps, **changes):
    """What the branch's residuals are multiplied by in each call of the branch."""
    seen = []
    hook = pipe.branch.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    draw(pipe, num_inference_steps=steps, **changes)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("schedule", "same"),
    [
        ("0:1:1", {}),
        ("0:0.5:1", {"branch_end": 0.5}),
        ("0.5:1:1", {"branch_start": 0.5}),
        ("0:1:0.5", {"branch_scale": 0.5}),
        ("0:1", {}),
        ([0.25], {"branch_scale": 0.25}),
        (lambda share: 0.0, {"branch_scale": 0.0}),
    ],
)
def test_constant_schedules_are_what_has_a_name(pipe, schedule, same):
    assert torch.equal(draw(pipe, branch_schedule=schedule), draw(pipe, **same))
    assert (draw(pipe, branch_scale=0.0) - draw(pipe)).abs().max() > 1e-3


def test_each_step_has_its_scale(pipe):
    assert scales_of(pipe, 10, branch_schedule="0:0.2:0,0.2:0.5:1,0.5:1:0.25") == [1] * 3 + [0.25] * 5
    assert scales_of(pipe, 5, branch_schedule="0:0.5,1:1.5") == pytest.approx([0.5, 0.75, 1, 1.25, 1.5])
    assert scales_of(pipe, 3, branch_schedule=[1, 0.5, 2], branch_scale=2.0) == [2, 1, 4]
    assert scales_of(pipe, 4, branch_schedule=lambda share: 1 - share, branch_end=0.5) == [1, 0.75]


def test_both_halves_of_a_second_order_step_have_one_scale(pipe):
    pipe.scheduler = make_scheduler("Heun")
    assert scales_of(pipe, 3, branch_schedule=[1, 2, 3]) == [1, 2, 2, 3, 3]


def test_a_part_of_a_drawing_has_steps_of_its_own(pipe):
    from PIL import Image

    from bdm.pipeline import BridgeImg2ImgPipeline

    other = BridgeImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    assert scales_of(other, 10, image=picture, strength=0.4, branch_schedule=[1, 2, 3, 4]) == [1, 2, 3, 4]


def test_what_is_used_again_is_as_strong(pipe):
    """Residuals of another strength are not used again; those of the same one are."""
    every = Approximation(branch_every=2)
    constant = draw(pipe, branch_schedule="0:1:1", approximation=every)
    assert torch.equal(constant, draw(pipe, approximation=every))
    rising = [1, 2, 3, 4]
    outputs_agree(draw(pipe, branch_schedule=rising, approximation=every), draw(pipe, branch_schedule=rising))


def test_branches_beside_have_schedules_too(pipe, branch, native):
    pipe.add_branch("other", branch, native)
    said = {"prompt": "月饼", "scale": 0.5}
    with_window = draw(pipe, beside={"other": {**said, "end": 0.5}})
    assert torch.equal(draw(pipe, beside={"other": {**said, "schedule": "0:0.5:1"}}), with_window)


@pytest.mark.parametrize("text", ["0:0.2:0,0.2:1:1", "0:0.333333:1.5", "0:0,0.5:1,1:0.25"])
def test_printing_and_reading_is_the_identity(text):
    assert str(read_schedule(text)) == text
    assert read_schedule(str(read_schedule(text))) == read_schedule(text)
    assert read_schedule(text.replace(",", "，").replace(":", "：")) == read_schedule(text)


def test_a_step_belongs_to_the_part_that_it_begins_in():
    parts = read_schedule("0:0.1:1,0.1:0.3:2,0.3:1:3")
    assert isinstance(parts, Segments)
    for total in (10, 20, 30, 50):
        found = [parts.at(i, total) for i in range(total)]
        assert found == [1] * (total // 10) + [2] * (total // 5) + [3] * (total * 7 // 10)
    assert Curve(((0.5, 2.0),)).at(0, 1) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "'' is no number; give segments"),
        ("0:1:x", "'x' is no number"),
        ("0:1:nan", "'nan' is no number"),
        ("0.5:0.2:1", "0.5 to 0.2 is no part"),
        ("0:2:1", "0 to 2 is no part"),
        ("0:0.5:1,0.4:1:0", "begins before 0.5"),
        ("0:1,0:2", "must rise"),
        ("0:1:1,1:1", "give segments"),
        ([], "branch schedule is"),
        ([1, "a"], "is 'a'"),
        (3.0, "branch schedule is 3.0"),
    ],
)
def test_other_schedules_are_refused(pipe, given, message):
    with pytest.raises(UserError, match=message):
        draw(pipe, branch_schedule=given)


def test_a_function_that_gives_no_number_is_refused_and_leaves_no_hook(pipe):
    before = draw(pipe)
    with pytest.raises(UserError, match="branch schedule at 0 is 'strong'"):
        draw(pipe, branch_schedule=lambda share: "strong")
    assert torch.equal(draw(pipe), before)


def test_the_world_slider_goes_from_one_end_to_the_other(pipe):
    english = dict(prompt_en="red lantern")
    assert torch.equal(draw(pipe, world=0, **english), draw(pipe))
    assert torch.equal(draw(pipe, world=1.0, **english), draw(pipe, branch_end=0.5, **english))
    assert torch.equal(draw(pipe, world=1e-9, **english), draw(pipe, **english))
    ends = [settings_of(world)[0].parts[0][1] for world in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert ends == sorted(ends, reverse=True)
    for wrong in (dict(world=1.5), dict(world=float("nan")), dict(world=0.5, branch_schedule="0:1:1")):
        with pytest.raises(UserError, match="world"):
            draw(pipe, **wrong)
