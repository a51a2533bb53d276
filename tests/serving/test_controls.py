"""Drawings with ControlNets of the same files share their calls, each with its own pictures and strengths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from community_files import make_controlnet
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image

import bdm
from bdm.drawing.attached import conditions_of
from bdm.drawing.complete import complete
from bdm.drawing.library import Library
from bdm.drawing.painter import Painter, draw_images
from bdm.extras import is_installed
from bdm.models.samplers import SAMPLERS
from bdm.serving.batch import Batch
from bdm.serving.course import Course
from bdm.serving.drawing import own_pipeline
from bdm.serving.joining import house_of

GIVEN = bdm.FileRef("tiny")


@pytest.fixture
def painter(pipe):
    return Painter("cpu", given=(GIVEN, "fp32", pipe), english=True)


@pytest.fixture
def control(files, tmp_path):
    """Gives a ControlNet's use, with a picture of its own by number."""

    def use(number, file="edges", **said):
        path = tmp_path / f"control{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return bdm.PluginUse(
            kind="controlnet", file=bdm.FileRef.to(files[file]), picture=bdm.FileRef.to(path), **said
        )

    return use


@pytest.fixture
def other(pipe, tmp_path, files):
    """Another ControlNet's folder, whose weights differ."""
    network = make_controlnet(pipe.unet)
    torch.nn.init.normal_(network.controlnet_mid_block.weight, std=0.4)
    network.save_pretrained(tmp_path / "depth")
    files["depth"] = tmp_path / "depth"


def asked(*plugins, **said):
    request = bdm.Request(**{"prompt": "龙", "prompt_en": "dragon", "steps": 3, "guidance": 4.0} | said)
    whole = complete(replace(request, plugins=plugins), Library())
    return replace(whole, model=GIVEN, precision="fp32")


def joined(painter, requests, apart=0):
    """All of them in one batch with the first one's plug-ins, each entering ``apart`` rounds later."""
    pipe = painter.pipeline(requests[0])
    batch, courses = Batch(pipe, lambda height, width: 99, requests[0]), []
    for request in requests:
        assert house_of(request) == house_of(requests[0])
        assert batch.controls.has(request)
        scheduler, names = painter.sampler(request), [use.name for use in request.plugins]

        def draw(course, request=request, scheduler=scheduler, names=names):
            hooks = batch.controls.hooks(request, course.ask)
            own = own_pipeline(pipe, scheduler, course.ask, names, hooks)
            return draw_images(own, [request], conditions_of(request.plugins), share=False)

        courses.append(Course(draw, batch.adapters.differences(request)))
        batch.enter(courses[-1])
        for _ in range(apart if batch.courses else 0):
            batch.round()
    while batch.courses:
        batch.round()
    batch.close()
    return courses


def check(painter, requests, **how):
    courses = joined(painter, requests, **how)
    for request, course in zip(requests, courses, strict=True):
        if course.error is not None:
            raise course.error
        one = draw_images(painter.pipeline(request), [request], conditions_of(request.plugins))
        error = (course.result - one).abs().max() / one.abs().max()
        assert error < 3e-5, (request.sampler, request.plugins, float(error))
    return courses


@pytest.mark.parametrize("apart", [0, 1])
def test_every_sampler_joins_with_a_control_of_its_own(painter, control, apart):
    names = [name for name in SAMPLERS if name != "LMS" or is_installed("scipy")]
    requests = [
        asked(control(i, strength=0.4 + 0.1 * i), sampler=name, seed=1, steps=2 + i % 3)
        for i, name in enumerate(names)
    ]
    courses = check(painter, requests, apart=apart)
    if not apart:
        assert {course.together for course in courses} == {len(requests)}
    assert min(course.together for course in courses) > 1


OTHERS = {
    "as it is": (dict(), {}),
    "weak": (dict(strength=0.25), {}),
    "against": (dict(strength=-0.5), {}),
    "silent": (dict(strength=0.0), {}),
    "late": (dict(start=0.5), {}),
    "early": (dict(end=0.5, strength=0.7), {}),
    "never": (dict(start=0.4, end=0.45), {}),
    "without words": (dict(), dict(prompt_en="")),
    "unguided": (dict(), dict(guidance=1.0)),
    "without a branch": (dict(), dict(branch_scale=0.0)),
    "composed": (dict(), dict(english_guidance=2.0)),
    "staged": (dict(), dict(prompt="[龙:月饼:0.5]", prompt_en="[red:blue:0.5]")),
    "joined": (dict(), dict(prompt="龙 AND 月饼:0.5", prompt_en="")),
    "interval": (dict(strength=0.9), dict(approximation=bdm.Approximation(guidance_start=0.3))),
    "without a control": (None, {}),
    "nor a branch": (None, dict(branch_scale=0.0)),
}


@pytest.mark.parametrize("apart", [0, 2])
def test_what_each_is_told_stays_its_own(painter, control, apart):
    requests = [
        asked(*([] if own is None else [control(i, **own)]), seed=1, steps=4, **said)
        for i, (own, said) in enumerate(OTHERS.values())
    ]
    courses = check(painter, requests, apart=apart)
    results = {name: course.result for name, course in zip(OTHERS, courses, strict=True)}
    assert torch.allclose(results["silent"], results["never"], atol=1e-5)
    for acting in ("as it is", "weak", "against", "late", "early"):
        assert not torch.allclose(results[acting], results["silent"], atol=1e-3), acting
    assert torch.allclose(results["silent"], results["without a control"], atol=1e-5)


def test_several_of_a_drawing_and_of_one_file(painter, control, other):
    first = asked(control(1), control(2, "depth", strength=0.6), seed=1)
    requests = [
        first,
        asked(control(3, "depth"), seed=1),
        asked(control(4, strength=0.7), control(5, strength=0.3), control(6, "depth"), seed=1),
        asked(seed=1),
    ]
    check(painter, requests)


def test_pooled_residuals_join_with_none(painter, pipe, control, monkeypatch):
    pooled, rows, plain = dict(pooled=True), [], pipe.unet.conv_out._conv_forward

    def counted(x, *others):
        rows.append(len(x))
        return plain(x, *others)

    monkeypatch.setattr(pipe.unet.conv_out, "_conv_forward", counted)
    requests = [
        asked(control(1, **pooled), branch_scale=0.0),
        asked(control(2, strength=0.5, **pooled), seed=2),
        asked(seed=1),
        asked(control(3, **pooled), guidance=1.0),
    ]
    check(painter, requests)
    assert max(rows) == 7


def test_one_call_for_all_and_of_equal_rows_one(painter, control, monkeypatch):
    rows, plain = [], ControlNetConditioningEmbedding.forward

    def counted(self, pictures):
        rows.append(len(pictures))
        return plain(self, pictures)

    monkeypatch.setattr(ControlNetConditioningEmbedding, "forward", counted)
    joined(painter, [asked(control(i), prompt_en="", seed=i) for i in range(3)])
    assert set(rows) == {3}, "both halves of a guided step say the same to it"
    rows.clear()
    joined(painter, [asked(control(i), seed=i) for i in range(3)])
    assert set(rows) == {6}


def test_a_control_picture_that_does_not_fit_ends_its_own_drawing_alone(painter, control, tmp_path):
    small = control(9)
    Image.new("RGB", (32, 32)).save(tmp_path / "control9.png")
    courses = joined(painter, [asked(control(1)), asked(small), asked(control(2))])
    assert isinstance(courses[1].error, bdm.UserError)
    assert "32x32" in str(courses[1].error)
    assert courses[0].error is None
    assert courses[2].error is None


def test_an_engine_joins_them_and_groups_other_files_apart(pipe, control, other):
    uses = [(control(1),), (control(2, strength=0.5),), (), (control(3, "depth"),)]
    requests = [bdm.Request(prompt="龙", steps=30, seed=i, plugins=use) for i, use in enumerate(uses)]
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        jobs = [engine.submit(request) for request in requests]
        drawn = [job.result(600) for job in jobs]
        assert engine.stats()["alone"] == 0
    assert [one.request.versions.together for one in drawn] == [3, 3, 3, 1]
    painter = Painter("cpu", given=(drawn[0].request.model, "fp32", pipe))
    for one in drawn:
        (alone,) = painter.draw([one.request])
        assert abs(np.asarray(one.image, int) - np.asarray(alone.image, int)).max() <= 1


def test_a_control_that_a_given_pipeline_brought_is_not_passed_over(pipe, files):
    pipe.plugins.attach(files["edges"], "edges")
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        job = engine.submit(bdm.Request(prompt="龙", steps=2))
        with pytest.raises(bdm.UserError, match="no control picture for 'edges'"):
            job.result(600)
