"""Engines and a plain painter at work in one process at once: each draws what it draws alone.

``BDM_STRESS`` says how many requests each of them gets.
"""

import os
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_branch, make_native, make_text_encoder, make_unet, make_vae

import bdm
from bdm.drawing.painter import Painter
from bdm.serving.job import Cancelled
from bdm.text.vocabulary import clip_tokenizer

STRESS = int(os.environ.get("BDM_STRESS", "12"))
SAID = [
    dict(guidance=1.0),
    dict(branch_scale=0.5),
    dict(branch_scale=0.0),
    dict(branch_end=0.5),
    dict(prompt_en="dragon", negative_en="blurry", negative="模糊"),
    dict(prompt_en="dragon", english_guidance=2.0),
    dict(prompt="[龙:月饼:0.5]"),
    dict(width=128),
    dict(clip_skip=2, prompt_en="dragon"),
    dict(approximation=bdm.Approximation(branch_every=2)),
    dict(plugins="ink"),
    dict(plugins="shift"),
]


def asked(chance, files):
    """A request of one kind or another."""
    said = dict(chance.choice(SAID))
    if "plugins" in said:
        file = bdm.FileRef.to(files[said["plugins"]])
        said["plugins"] = (bdm.PluginUse(kind="adapter", file=file, strength=0.8),)
    sampler = chance.choice(["", "Euler a", "DPM++ 2M", "DPM++ SDE", "DDIM"])
    more = dict(seed=chance.randrange(99), steps=chance.randint(1, 4), sampler=sampler)
    return bdm.Request(**{"prompt": "龙", "guidance": 3.0} | said | more)


def made():
    torch.manual_seed(0)
    unet = make_unet()
    parts = make_vae(), make_text_encoder(), clip_tokenizer(), unet
    scheduler = bdm.models.samplers.make_scheduler("DDIM")
    pipe = bdm.BridgePipeline(*parts, scheduler, make_branch(unet), make_native())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_an_engine(pipe, requests, chance, found, error):
    """Draw by an engine, looking at previews, with others that are cancelled."""
    try:
        with bdm.Engine(pipeline=pipe, device="cpu") as engine:
            jobs, lost = [], []
            for request in requests:
                jobs.append(engine.submit(request))
                if chance.random() < 0.3:
                    lost.append(engine.submit(replace(request, steps=50)))
                if chance.random() < 0.3:
                    chance.choice(jobs).preview()
                if lost and chance.random() < 0.7:
                    lost.pop(0).cancel()
            for job in lost:
                job.cancel()
            for job in lost:
                with pytest.raises(Cancelled):
                    job.result(600)
            found += [job.result(600) for job in jobs]
    except BaseException as wrong:
        error.append(wrong)


def by_a_painter(pipe, requests, found, error):
    try:
        painter = Painter("cpu", given=(requests[0].model, "fp32", pipe))
        found += [painter.draw([request])[0] for request in requests]
    except BaseException as wrong:
        error.append(wrong)


@pytest.mark.slow
def test_engines_and_a_painter_side_by_side(files):
    chance, error = random.Random(0), []
    requests = [asked(chance, files) for _ in range(STRESS)]
    first, second, plain, whole = [], [], [], []
    with bdm.Engine(pipeline=made(), device="cpu", joining=False) as engine:
        for request in requests:
            drawn = engine.submit(request).result(600)
            whole.append(drawn.request)
            plain.append(np.asarray(drawn.image, int))
    painted, others = [], chance.sample(range(STRESS), STRESS)
    pipes = [made() for _ in range(3)]  # here, since all threads draw weights from one generator
    mixed = [requests[i] for i in others]
    threads = [
        threading.Thread(target=by_an_engine, args=(pipes[0], requests, random.Random(1), first, error)),
        threading.Thread(target=by_an_engine, args=(pipes[1], mixed, chance, second, error)),
        threading.Thread(target=by_a_painter, args=(pipes[2], whole, painted, error)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not error, error
    for drawn, places in ((first, range(STRESS)), (second, others), (painted, range(STRESS))):
        for one, place in zip(drawn, places, strict=True):
            assert abs(np.asarray(one.image, int) - plain[place]).max() <= 1, requests[place]
