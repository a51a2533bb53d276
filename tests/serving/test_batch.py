"""Joined drawings are what they are alone, whatever each is told and whenever it comes."""

from dataclasses import replace

import pytest
import torch

import bdm
from bdm.drawing.complete import complete
from bdm.drawing.library import Library
from bdm.drawing.painter import Painter, draw_images
from bdm.extras import is_installed
from bdm.models.samplers import SAMPLERS
from bdm.serving.batch import Batch
from bdm.serving.course import Course
from bdm.serving.drawing import own_pipeline
from bdm.speed.joined import JoinedBranch, joined_rows

GIVEN = bdm.FileRef("tiny")


def asked(**said):
    request = bdm.Request(**{"prompt": "龙", "steps": 3, "guidance": 4.0} | said)
    return replace(complete(request, Library()), model=GIVEN, precision="fp32")


@pytest.fixture
def painter(pipe):
    return Painter("cpu", given=(GIVEN, "fp32", pipe))


def alone(painter, request):
    return draw_images(painter.pipeline(request), [request], {})


def joined(painter, requests, bound=99, apart=0):
    """All of them in one batch, each entering ``apart`` rounds behind the one before."""
    pipe = painter.pipeline(requests[0])
    batch, courses = Batch(pipe, lambda height, width: bound), []
    for request in requests:
        scheduler = painter.sampler(request)

        def draw(course, request=request, scheduler=scheduler):
            return draw_images(own_pipeline(pipe, scheduler, course.ask), [request], {}, share=False)

        courses.append(Course(draw))
        batch.enter(courses[-1])
        for _ in range(apart):
            if batch.courses:
                batch.round()
    while batch.courses:
        batch.round()
    batch.close()
    for course in courses:
        if course.error is not None:
            raise course.error
    return courses


def check(painter, requests, **how):
    courses = joined(painter, requests, **how)
    for request, course in zip(requests, courses, strict=True):
        one = alone(painter, request)
        error = (course.result - one).abs().max() / one.abs().max()
        assert error < 3e-5, (request.sampler, float(error))
    return courses


def test_every_sampler_joins(painter):
    names = [name for name in SAMPLERS if name != "LMS" or is_installed("scipy")]
    requests = [asked(sampler=name, seed=i, steps=3 + i % 3) for i, name in enumerate(names)]
    requests.append(asked(sampler="Euler a", schedule="Karras", seed=99))
    courses = check(painter, requests)
    assert max(course.together for course in courses) == len(requests)


OTHERS = {
    "unguided": dict(guidance=1.0),
    "weak": dict(branch_scale=0.5),
    "bare": dict(branch_scale=0.0),
    "window": dict(branch_end=0.5),
    "schedule": dict(branch_schedule="0:0.4:0,0.4:1:1.5"),
    "English": dict(prompt_en="dragon", negative_en="blurry", negative="模糊"),
    "composed": dict(prompt_en="dragon", english_guidance=2.0),
    "joined": dict(prompt="龙 AND 月饼:0.5"),
    "staged": dict(prompt="[龙:月饼:0.5]", prompt_en="[red:blue:0.5]"),
    "world": dict(prompt_en="dragon", world=0.7),
    "interval": dict(approximation=bdm.Approximation(guidance_start=0.3)),
    "clip": dict(prompt_en="dragon", clip_skip=2),
}


@pytest.mark.parametrize("apart", [0, 2])
def test_what_each_is_told_stays_its_own(painter, apart):
    requests = [asked(seed=i, steps=4, **said) for i, said in enumerate(OTHERS.values())]
    check(painter, requests, apart=apart)


def test_sizes_are_grouped_and_take_turns(painter):
    requests = [asked(seed=i, width=64 + 64 * (i % 2), height=64) for i in range(4)]
    courses = check(painter, requests)
    assert {course.together for course in courses} == {2}
    assert {course.since for course in courses[::2]} != {course.since for course in courses[1::2]}


def test_a_bound_on_the_batch(painter):
    courses = check(painter, [asked(seed=i) for i in range(5)], bound=2)
    assert {course.together for course in courses} == {2}


def test_pictures_to_start_from_join(painter, tmp_path):
    (picture,) = painter.draw([asked(seed=3)])
    file = picture.save(tmp_path / "start.png")
    mode = bdm.Mode("image", (("image", bdm.FileRef.to(file)),), (("strength", 0.7),))
    check(painter, [asked(seed=1, mode=mode), asked(seed=2)])


def test_with_somebody_elses_hook_the_plain_way_is_taken(painter, pipe):
    rows = set()
    pipe.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda _, args: rows.add(len(args[0])))
    joined(painter, [asked(seed=i) for i in range(3)])
    assert rows == {6}


def test_what_a_guided_step_would_do_twice_is_done_once(painter, pipe, monkeypatch):
    rows = []
    plain = pipe.unet.conv_in._conv_forward

    def counted(x, *others):
        rows.append(len(x))
        return plain(x, *others)

    monkeypatch.setattr(pipe.unet.conv_in, "_conv_forward", counted)
    joined(painter, [asked(seed=i) for i in range(3)])
    assert set(rows) == {3}
    rows.clear()
    joined(painter, [asked(seed=0), asked(seed=1, prompt_en="dragon"), asked(seed=2)])
    assert set(rows) == {4}, "where the English texts differ, both are computed"


def test_one_that_fails_in_a_call_ends_none_of_the_others(painter, monkeypatch):
    plain = JoinedBranch.__call__

    def failing(self, calls):
        if any(call["conditioning_scale"] == 0.25 for call in calls):
            raise RuntimeError("of this one alone")
        return plain(self, calls)

    monkeypatch.setattr(JoinedBranch, "__call__", failing)
    requests = [asked(seed=0), asked(seed=1, branch_scale=0.25), asked(seed=2)]
    with pytest.raises(RuntimeError, match="of this one alone"):
        joined(painter, requests)
    check(painter, requests[::2])


def test_nan_stays_where_it_is(painter, monkeypatch):
    plain = JoinedBranch.__call__

    def broken(self, calls):
        found = plain(self, calls)
        for call, (_, middle) in zip(calls, found, strict=True):
            if call["conditioning_scale"] == 0.25:
                middle.fill_(torch.nan)
        return found

    requests = [asked(seed=0), asked(seed=1, branch_scale=0.25), asked(seed=2)]
    with monkeypatch.context() as patch:
        patch.setattr(JoinedBranch, "__call__", broken)
        courses = joined(painter, requests)
    assert not courses[1].result.isfinite().all()
    for i in (0, 2):
        torch.testing.assert_close(courses[i].result, alone(painter, requests[i]), rtol=3e-5, atol=3e-5)


def test_pieces_of_one_tensor_are_not_copied():
    whole = torch.randn(6, 3, 2, 2)
    assert joined_rows(whole.split([2, 1, 3])).data_ptr() == whole.data_ptr()
    assert torch.equal(joined_rows(whole.split([2, 1, 3])), whole)
    first, second, third = whole.split(2)
    for pieces in ((first, third), (second, first), (first, second.clone(), third), (first, first)):
        assert torch.equal(joined_rows(pieces), torch.cat(pieces))


def test_a_strength_for_each_sample(branch):
    sample, features = torch.randn(3, 4, 8, 8), torch.randn(3, 5, branch.config["cross_attention_dim"])
    scales = [0.5, 2.0, 0.0]
    down, middle = branch(sample, torch.tensor([5, 7, 9]), features, torch.tensor(scales), return_dict=False)
    for i, (step, scale) in enumerate(zip((5, 7, 9), scales, strict=True)):
        one = branch(sample[i : i + 1], step, features[i : i + 1], scale, return_dict=False)
        for ours, theirs in zip((*down, middle), (*one[0], one[1]), strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=3e-5, atol=1e-5)
