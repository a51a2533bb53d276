"""Drawings with adapters at strengths of their own share the networks' calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bdm
from bdm.drawing.complete import complete
from bdm.drawing.library import Library
from bdm.drawing.painter import Painter, draw_images
from bdm.serving.batch import Batch
from bdm.serving.course import Course
from bdm.serving.drawing import own_pipeline

GIVEN = bdm.FileRef("tiny")


@pytest.fixture
def wave(pipe, tmp_path):
    """An adapter of convolutions, time embeddings and projections, in the encoder and behind it."""
    torch.manual_seed(5)
    tensors = {}
    for name, layer in pipe.unet.named_modules():
        wanted = name.endswith((".conv1", ".time_emb_proj", ".proj_in", ".attn2.to_v", ".attn1.to_q"))
        if wanted and "upsamplers" not in name:
            outputs, *inputs = layer.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, *inputs) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, 2, *[1] * (len(inputs) - 1)) * 0.2
    assert len(tensors) > 20
    save_file(tensors, tmp_path / "wave.safetensors")
    return tmp_path / "wave.safetensors"


def use(file, strength, text_strength=None, name=""):
    said = {"strength": strength, "text_strength": text_strength, "name": name}
    return bdm.PluginUse(kind="adapter", file=bdm.FileRef.to(file), **said)


def asked(*plugins, **said):
    request = bdm.Request(**{"prompt": "龙", "prompt_en": "dragon", "steps": 2, "guidance": 4.0} | said)
    whole = complete(replace(request, plugins=plugins), Library())
    return replace(whole, model=GIVEN, precision="fp32")


def joined(painter, requests):
    """All of them in one batch with the first one's plug-ins in the weights; None for one that cannot be."""
    pipe = painter.pipeline(requests[0])
    batch, courses = Batch(pipe, lambda height, width: 99, requests[0]), []
    for request in requests:
        differences = batch.adapters.differences(request)
        if differences is None:
            courses.append(None)
            continue
        scheduler = painter.sampler(request)
        names = None if request is requests[0] else [plugin.name for plugin in request.plugins]

        def draw(course, request=request, scheduler=scheduler, names=names):
            own = own_pipeline(pipe, scheduler, course.ask, names)
            with batch.adapters.in_texts(course.differences):
                return draw_images(own, [request], {}, share=False)

        courses.append(Course(draw, differences))
        batch.enter(courses[-1])
    while batch.courses:
        batch.round()
    batch.close()
    return courses


def check(painter, requests):
    courses = joined(painter, requests)
    for request, course in zip(requests, courses, strict=True):
        if course.error is not None:
            raise course.error
        one = draw_images(painter.pipeline(request), [request], {})
        error = (course.result - one).abs().max() / one.abs().max()
        assert error < 3e-5, (request.plugins, float(error))
        assert course.together == len(requests)
    return courses


@pytest.fixture
def painter(pipe):
    return Painter("cpu", given=(GIVEN, "fp32", pipe), english=True)


def test_strengths_differ_between_joined_drawings(painter, pipe, files, wave):
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    courses = check(
        painter,
        [
            asked(use(wave, 0.8), seed=1),
            asked(use(wave, 0.3), seed=2, prompt_en=""),  # whose rows are one in the encoder
            asked(seed=1),
            asked(use(wave, -0.5), use(files["ink"], 1.0, 0.4), seed=1, steps=3, branch_scale=0.5),
            asked(use(files["ink"], 0.0, 1.5), seed=1, guidance=1.0),
        ],
    )
    assert not torch.allclose(courses[0].result, courses[2].result, atol=1e-3), "the adapter acts"
    assert not torch.allclose(courses[4].result, courses[2].result, atol=1e-3), "in the texts too"
    painter.pipeline(asked())
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.unet.state_dict().items())


def test_strengths_that_prompts_name_are_each_drawings_own(painter, wave):
    named = [
        asked(use(wave, strength, strength, name), prompt_en=f"dragon <lora:{name}:{strength}>")
        for name, strength in (("wave", 0.8), ("wave", 0.3), ("sea", 0.5))
    ]
    check(painter, named)


def test_what_is_more_than_a_low_rank_change_is_drawn_apart(painter, files, wave):
    shifted = asked(use(files["shift"], 0.5))
    assert joined(painter, [asked(), shifted, asked(use(wave, 99.0))])[1:] == [None, None]
    assert joined(painter, [shifted, asked()])[1] is None
    assert joined(painter, [shifted, shifted])[1] is not None


def test_an_engine_joins_them(pipe, files, wave):
    requests = [
        bdm.Request(prompt="龙", steps=30, seed=i, plugins=plugins)
        for i, plugins in enumerate([(), (use(wave, 0.8),), (use(wave, 0.4),), (use(files["shift"], 1.0),)])
    ]
    with bdm.Engine(pipeline=pipe, device="cpu") as engine:
        drawn = [job.result(600) for job in [engine.submit(request) for request in requests]]
    assert [one.request.versions.together for one in drawn[:3]] == [3, 3, 3]
    assert drawn[3].request.versions.together == 1
    painter = Painter("cpu", given=(drawn[0].request.model, "fp32", pipe))
    for one in drawn:
        (alone,) = painter.draw([one.request])
        assert abs(np.asarray(one.image, int) - np.asarray(alone.image, int)).max() <= 1
