"""Every exact saving against the plain doubled batch: alone, together, and with each plug-in attached."""

import pytest
import torch
from safetensors.torch import save_file

from bdm.pipeline import BridgeImg2ImgPipeline
from bdm.speed import folding, packing, sharing

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}
PLUGINS = {
    "none": (),
    "adapters": ("ink", "sharper"),
    "ControlNet": ("edges",),
    "checkpoint and VAE": ("style", "colours"),
    "all": ("style", "colours", "ink", "sharper", "edges", "mood"),
}
MIXED = dict(prompt=["龙", "红灯笼"], prompt_en=["", "a cat, mood"], num_images_per_prompt=2)


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(folding, "LEAST_FLOPS", 0)
    for least in ("LEAST_CONVOLUTION", "LEAST_LINEAR", "LEAST_ROWS"):
        monkeypatch.setattr(packing, least, 1)


@pytest.fixture
def sharper(pipe, tmp_path):
    """An adapter on convolutions that are folded."""
    path = tmp_path / "sharper.safetensors"
    save_file({"lora_unet_up_blocks_0_upsamplers_0_conv.diff": torch.randn(32, 32, 3, 3) * 0.1}, path)
    return path


def draw(pipe, share, **changes):
    if pipe.plugins._controlnets:
        changes["control_images"] = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    settings = (
        dict(prompt="龙", num_inference_steps=2, guidance_scale=5.0, seed=1, output_type="pt") | changes
    )
    return pipe(**settings, share=share).images


def check(pipe, dtype, **changes):
    plain, shared = draw(pipe, False, **changes), draw(pipe, True, **changes)
    error = (shared.double() - plain.double()).abs().max() / plain.double().abs().max()
    assert error <= TOLERANCE[dtype]
    return plain


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("names", PLUGINS.values(), ids=list(PLUGINS))
def test_together_with_each_plugin(pipe, files, sharper, names, dtype):
    pipe.to(dtype)
    bare = check(pipe, dtype, **MIXED)
    for name in names:
        pipe.plugins.attach(sharper if name == "sharper" else files[name])
    plugged = check(pipe, dtype, **MIXED)
    assert not names or not torch.equal(plugged, bare)
    pipe.plugins.clear()
    assert torch.equal(draw(pipe, False, **MIXED), bare)


@pytest.mark.parametrize("alone", ["encoder", "prefix", "projections", "folding", "nothing"])
def test_each_alone(pipe, monkeypatch, alone):
    """With the other savings switched off, every one still gives the same picture."""
    pipe.to(torch.float64)
    if alone != "folding":
        monkeypatch.setattr(folding, "LEAST_FLOPS", float("inf"))
    hook = sharing.SharedWork._hook

    def chosen(work, module, added):
        if isinstance(added, sharing.DistinctRows):
            mine = alone == ("encoder" if added.plan is work.encoder else "prefix")
        else:
            mine = alone == "projections"
        if mine:
            hook(work, module, added)

    monkeypatch.setattr(sharing.SharedWork, "_hook", chosen)
    check(pipe, torch.float64)
    check(pipe, torch.float64, **MIXED | dict(prompt_en=["", "a cat"]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_picture_to_picture(pipe, dtype):
    pictures = BridgeImg2ImgPipeline(**pipe.components).to(dtype)
    pictures.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 64, 64, dtype=dtype)
    check(pictures, dtype, image=start, strength=0.8, num_inference_steps=3)


def test_strength_changed_between_steps_counts(pipe, files, sharper):
    """A step's callback may change weights; nothing that was kept of the old ones is used."""
    for path in (files["ink"], sharper):
        pipe.plugins.attach(path)

    def turn(_, step, timestep, tensors):
        for plugin in pipe.plugins:
            pipe.plugins.set_strength(plugin.name, -4.0)
        return tensors

    def drawn(share, **settings):
        for plugin in pipe.plugins:
            pipe.plugins.set_strength(plugin.name, 1.0)
        return draw(pipe, share, num_inference_steps=3, **settings)

    changed = drawn(False, callback_on_step_end=turn)
    torch.testing.assert_close(drawn(True, callback_on_step_end=turn), changed, rtol=0, atol=3e-5)
    assert (drawn(True) - changed).abs().max() > 1e-3


@pytest.mark.parametrize(("settings", "calls", "rows"), [
    (dict(), 2, {2}),
    (dict(guidance_scale=1.0), 2, {1}),
    (dict(branch_scale=0.0), 0, set()),
    (dict(branch_start=0.5), 1, {2}),
    (dict(branch_end=0.5), 1, {2}),
])  # fmt: skip
def test_branch_works_only_where_it_counts(pipe, settings, calls, rows):
    """Off, it is not run; without guidance, nothing is doubled."""
    seen = []
    handle = pipe.branch.mid_block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    check(pipe, torch.float32, **settings)
    handle.remove()
    assert len(seen) == 2 * calls, "once plain, once shared"
    assert set(seen) == rows
