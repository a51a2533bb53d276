"""``pipe.optimize()``.

Pictures stay the same, weights are found by whatever asks for them, and undone it has left nothing.
"""

import copy
import pickle

import pytest
import torch

from bdm import BridgePipeline, UserError
from bdm.speed import packing
from bdm.speed.optimize import compilable


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    for least in ("LEAST_CONVOLUTION", "LEAST_LINEAR", "LEAST_ROWS"):
        monkeypatch.setattr(packing, least, 1)


def draw(pipe, **changes):
    settings = (
        dict(prompt="龙", num_inference_steps=2, guidance_scale=5.0, seed=1, output_type="pt") | changes
    )
    return pipe(**settings).images


def weights(pipe):
    return {
        (part, name): value.clone()
        for part in ("unet", "branch", "vae")
        for name, value in getattr(pipe, part).named_parameters()
    }


def test_same_pictures_and_nothing_left_behind(pipe):
    before, plain = weights(pipe), draw(pipe, share=False)
    done = pipe.optimize()
    assert done.packed > 100, "packed before the first picture"
    assert f"{done.packed} layers" in str(done)
    assert done.seconds > 0
    count = done.packed
    for size in (dict(), dict(height=32, width=96)):
        torch.testing.assert_close(draw(pipe, **size), draw(pipe, share=False, **size), rtol=0, atol=3e-5)
    assert done.packed == count, "still packed after it"
    done.undo()
    after = weights(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(draw(pipe, share=False), plain)


def test_nothing_is_packed_again(pipe, monkeypatch):
    pipe.optimize()
    monkeypatch.setattr(packing.PackedLayer, "_hold", lambda *_: pytest.fail("packed again"))
    draw(pipe)
    draw(pipe, guidance_scale=1.0)


def test_who_reads_weights_is_told_of(pipe):
    done = pipe.optimize()
    count, plain = done.packed, draw(pipe)
    pipe.unet.state_dict()
    assert done.packed < count
    assert "optimize() packs them again" in str(done)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=3e-5)
    assert pipe.optimize().packed == count


def test_only_what_a_plugin_changes_is_unpacked(pipe, files):
    done = pipe.optimize()
    count = done.packed
    pipe.plugins.attach(files["shift"])
    assert count - 3 < done.packed <= count


def test_copies_are_not_optimized(pipe):
    pipe.optimize()
    plain = draw(pipe)
    unet = copy.deepcopy(pipe.unet)
    assert all(type(module).__module__ != "bdm.speed.stand_in" for module in unet.modules())
    assert all(type(weight) is torch.nn.Parameter for weight in unet.parameters())
    pickle.dumps(pipe.branch)
    assert all(value.numel() for value in pipe.vae.decoder.state_dict().values())
    pipe.unet = unet
    torch.testing.assert_close(draw(pipe, share=False), plain, rtol=0, atol=3e-5)


def test_plugins_come_and_go(pipe, files):
    plain = draw(pipe, share=False)
    pipe.plugins.attach(files["ink"], strength=4.0)
    plugged = draw(pipe, share=False)
    pipe.plugins.clear()
    pipe.optimize()
    pipe.plugins.attach(files["ink"], strength=4.0)
    torch.testing.assert_close(draw(pipe), plugged, rtol=0, atol=3e-5)
    pipe.plugins.clear()
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=3e-5)
    assert (plugged - plain).abs().max() > 1e-3


def test_saved_and_moved_as_if_it_had_not_been(pipe, tmp_path):
    noise, before = torch.randn(1, 4, 8, 8), weights(pipe)
    plain = draw(pipe, share=False, latents=noise)
    pipe.optimize()
    pipe.save_pretrained(tmp_path)
    loaded = BridgePipeline.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(loaded).items())
    draw(pipe)
    pipe.to(torch.float64)
    torch.testing.assert_close(draw(pipe, latents=noise.double()), plain.double(), rtol=0, atol=3e-5)


def test_what_cannot_be_optimized_is_said(pipe):
    with pytest.raises(UserError, match="count 0"):
        pipe.optimize(count=0)
    pipe.vae = None
    with pytest.raises(UserError, match="has no vae, which optimize"):
        pipe.optimize()


def test_a_failure_changes_nothing(pipe, monkeypatch):
    before = weights(pipe)
    with pytest.raises(UserError, match="width 65"):
        pipe.optimize(width=65)
    monkeypatch.setattr(pipe.vae, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.optimize()
    after = weights(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(pipe):
    """What a GPU gets, here on the CPU; nothing within the compiled blocks is hooked."""
    plain = draw(pipe, share=False)
    blocks = [block for network in (pipe.unet, pipe.branch) for block in compilable(network)]
    assert len(blocks) > 40
    for block in blocks:
        block.compile(dynamic=False)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-4)
