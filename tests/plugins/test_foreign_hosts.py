"""Plug-ins beside what other software does to the same networks: acted on where it is known, else refused."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig
from tiny import make_unet
from torch import nn

from bdm.errors import UserError
from bdm.plugins import Plugins

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refused(attach, *words):
    """An attachment that is refused in one line that says these words."""
    with pytest.raises(UserError) as error:
        attach()
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def add_lora(unet, name="stock", dora=False):
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"], use_dora=dora), adapter_name=name)
    unet.requires_grad_(False)
    for key, p in unet.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, std=0.3)


def drop_lora(unet, name="stock"):
    unet.delete_adapters(name)


def predict(unet):
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 8, 8, generator=dice), 7, torch.randn(2, 5, 32, generator=dice)).sample


@pytest.mark.parametrize("name", ["ink", "style"])
@pytest.mark.parametrize("fused", [False, True])
def test_beside_a_stock_lora_weights_are_let_alone(pipe, files, name, fused):
    before = weights_of(pipe.unet)
    add_lora(pipe.unet)
    if fused:
        pipe.fuse_lora()
    refused(
        lambda: pipe.plugins.attach(files[name]),
        "'stock'", "unload_lora_weights()", *(["unfuse_lora()"] if fused else []),
    )  # fmt: skip
    assert len(pipe.plugins) == 0
    if fused:
        pipe.unfuse_lora()
    drop_lora(pipe.unet)
    pipe.unload_lora_weights()
    assert all(torch.allclose(p, before[key], atol=1e-6) for key, p in weights_of(pipe.unet).items())
    pipe.plugins.attach(files[name])


def test_what_a_stock_lora_is_not_on_can_be_changed(pipe, files):
    add_lora(pipe.unet)
    with_lora = predict(pipe.unet)
    for name in ("shift", "mood", "colours", "edges"):
        pipe.plugins.attach(files[name])
    assert not torch.equal(predict(pipe.unet), with_lora)
    pipe.plugins.clear()
    assert torch.equal(predict(pipe.unet), with_lora)


@pytest.mark.parametrize("dora", [False, True])
def test_a_later_stock_lora_adds_up(pipe, files, dora):
    """What is attached stays beneath it, follows its strength, and comes off alone."""
    before = weights_of(pipe.unet)
    base = dict(pipe.unet.named_modules())[TO_K]
    pipe.plugins.attach(files["ink"])
    add_lora(pipe.unet, dora=dora)
    both = predict(pipe.unet)
    pipe.plugins.set_strength("ink", 0.5)
    assert not torch.allclose(predict(pipe.unet), both)
    pipe.plugins.set_strength("ink", 1.0)
    torch.testing.assert_close(predict(pipe.unet), both)
    pipe.plugins.detach("ink")
    assert torch.equal(base.weight, before[f"{TO_K}.weight"])
    drop_lora(pipe.unet)
    pipe.unload_lora_weights()
    assert same(weights_of(pipe.unet), before)


def test_pictures_with_a_lora_that_diffusers_loads_later(pipe, files):
    """Both act, each follows its own strength, and either may go first."""
    control = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)

    def draw(**settings):
        pictures = control if "edges" in pipe.plugins else None
        return pipe(
            "龙",
            prompt_en="mood",
            seed=1,
            num_inference_steps=2,
            output_type="pt",
            control_images=pictures,
            **settings,
        ).images

    before = draw()
    for name in ("ink", "edges", "mood"):
        pipe.plugins.attach(files[name])
    plugged = draw()
    factors = {
        f"unet.{TO_K}.lora_A.weight": torch.randn(2, 32),
        f"unet.{TO_K}.lora_B.weight": torch.randn(16, 2),
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 32),
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(32, 2),
    }
    pipe.load_lora_weights(factors, adapter_name="stock")
    both = draw()
    assert not torch.allclose(both, plugged)
    weak = draw(plugin_strength={"ink": 0.1})
    assert not torch.allclose(weak, both)
    torch.testing.assert_close(draw(), both)
    pipe.plugins.clear()
    alone = draw()
    assert not torch.allclose(alone, before)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(), before)


def test_a_later_fused_lora_must_be_undone_first(pipe, files):
    before = weights_of(pipe.unet)
    pipe.plugins.attach(files["ink"])
    add_lora(pipe.unet)
    pipe.fuse_lora()
    refused(lambda: pipe.plugins.detach("ink"), "unfuse_lora()")
    refused(lambda: pipe.plugins.set_strength("ink", 0.5), "unfuse_lora()")
    assert pipe.plugins["ink"].strength == {"unet": 1.0, "text_encoder": 1.0}
    pipe.unfuse_lora()
    pipe.plugins.detach("ink")
    drop_lora(pipe.unet)
    pipe.unload_lora_weights()
    after = weights_of(pipe.unet)
    assert torch.equal(
        after[f"{TO_K}.weight"], before[f"{TO_K}.weight"]
    )  # the others are peft's, but for rounding
    assert all(torch.allclose(after[key], weight, atol=1e-6) for key, weight in before.items())


@pytest.mark.parametrize("change", ["fused and unloaded", "loaded", "trained"])
def test_weights_that_others_have_changed_are_not_overwritten(pipe, files, change):
    pipe.plugins.attach(files["ink"])
    if change == "loaded":
        pipe.unet.load_state_dict(make_unet().state_dict())
    elif change == "trained":
        pipe.unet.get_submodule(TO_K).weight.data += 1e-3
    else:
        add_lora(pipe.unet)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    changed = weights_of(pipe.unet)
    refused(lambda: pipe.plugins.detach("ink"), "changed by others")
    assert same(weights_of(pipe.unet), changed)
    assert "ink" in pipe.plugins


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moving_to_another_dtype_is_no_change(pipe, files, dtype):
    before = weights_of(pipe.unet)
    pipe.plugins.attach(files["ink"])
    pipe.unet.to(dtype)
    pipe.plugins.set_strength("ink", 0.5)
    pipe.unet.to(torch.float32).to(memory_format=torch.channels_last)
    pipe.plugins.detach("ink")
    ink = {f"{TO_K}.weight"}
    after = weights_of(pipe.unet)
    assert all(torch.equal(after[key], before[key]) for key in ink)


class Int8Params(nn.Parameter):
    """As quantising libraries make parameters: a class of their own."""


class Linear8bit(nn.Linear):
    """As they make layers."""


def quantise_parameter(unet):
    layer = unet.get_submodule(TO_K)
    layer.weight = Int8Params(layer.weight.data, requires_grad=False)


def quantise_layer(unet):
    parent = unet.get_submodule(TO_K.rpartition(".")[0])
    parent.to_k.__class__ = Linear8bit


def quantise_in_torch(unet):
    torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, inplace=True)


def half_of_half(unet):
    layer = unet.get_submodule(TO_K)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def parametrise(unet):
    torch.nn.utils.parametrizations.weight_norm(unet.get_submodule(TO_K))


def group_offload(unet):
    apply_group_offloading(
        unet, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )


def cast(unet):
    apply_layerwise_casting(unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("treat", "word"),
    [
        (quantise_parameter, "Int8Params"), (quantise_layer, "Linear8bit"), (quantise_in_torch, "quantized"),
        (half_of_half, "float8_e4m3fn"), (parametrise, "to_k"), (group_offload, "group offloading"),
        (cast, "layerwise casting"), (lambda unet: cpu_offload(unet, torch.device("cpu")), "offloaded"),
        (lambda unet: unet.fuse_qkv_projections(), "unfuse_qkv_projections()"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["ink", "style"])
def test_treated_networks_are_named(pipe, files, treat, word, name):
    treat(pipe.unet)
    refused(lambda: pipe.plugins.attach(files[name]), word)
    assert len(pipe.plugins) == 0
    pipe.plugins.attach(files["colours"])  # the VAE was not treated


@pytest.mark.parametrize("treat", [half_of_half, lambda unet: unet.fuse_qkv_projections()])
def test_what_is_attached_cannot_come_off_after_a_treatment(pipe, files, treat):
    pipe.plugins.attach(files["ink"])
    treat(pipe.unet)
    refused(lambda: pipe.plugins.detach("ink"), TO_K)
    assert "ink" in pipe.plugins


def test_compiled_networks_are_the_networks_within(pipe, files):
    before, plain = weights_of(pipe.unet), pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    for name in ("style", "ink", "edges"):
        pipe.plugins.attach(files[name])
    pipe.unet = plain  # no exchange
    pipe.plugins.set_strength("ink", 0.5)
    pipe.unet = torch.compile(plain, backend="eager")
    pipe.plugins.clear()
    assert same(weights_of(plain), before)


def test_attaching_in_inference_mode_leaves_ordinary_weights(pipe, files):
    with torch.inference_mode():
        for name in ("style", "ink", "mood"):
            pipe.plugins.attach(files[name])
        pipe.plugins.set_strength("ink", 0.5)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert not any(p.is_inference() for part in parts for p in part.parameters())
    with torch.inference_mode():
        pipe.plugins.clear()
    assert not any(p.is_inference() for part in parts for p in part.parameters())


def test_copies_of_a_network_are_their_own(pipe, files):
    pipe.plugins.attach(files["ink"])
    pipe.plugins.attach(files["edges"])
    other = copy.deepcopy(pipe.unet)
    with_ink = predict(other)
    pipe.plugins.clear()
    assert torch.equal(predict(other), with_ink)
    Plugins(type("Other", (), {"unet": other})()).attach(files["shift"])
    assert not torch.equal(predict(other), with_ink)
