"""``pipe.optimize()``.

Pictures stay the same, weights are found by whatever asks for them, and undone it has left nothing.
"""

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
    count = sum(len(packing.packable(part)) for part in (pipe.unet, pipe.branch, pipe.vae))
    done = pipe.optimize()
    assert f"{count} layers" in str(done)
    assert done.seconds > 0
    empty = [name for name, value in weights(pipe).items() if not value.numel()]
    assert len(empty) > 100, "packed before the first picture"
    for size in (dict(), dict(height=32, width=96)):
        torch.testing.assert_close(draw(pipe, **size), draw(pipe, share=False, **size), rtol=0, atol=3e-5)
    assert [name for name, value in weights(pipe).items() if not value.numel()] == empty, (
        "still packed after it"
    )
    done.undo()
    after = weights(pipe)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(draw(pipe, share=False), plain)


def test_nothing_is_packed_again(pipe, monkeypatch):
    pipe.optimize()
    monkeypatch.setattr(packing.PackedLayer, "_pack", lambda *_: pytest.fail("packed again"))
    draw(pipe)
    draw(pipe, guidance_scale=1.0)


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
