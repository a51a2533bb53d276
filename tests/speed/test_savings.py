"""Every exact saving against the plain doubled batch: alone, together, and in every condition."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from bdm import Bridge, NativeCondition
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.pipeline import BridgeControlNetPipeline, BridgeImg2ImgPipeline, BridgeInpaintPipeline
from bdm.speed import bridge as savings
from bdm.speed import folding, packing

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
    if pipe.plugins.controlnets:
        changes["control_images"] = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    settings = (
        dict(prompt="龙", num_inference_steps=2, guidance_scale=5.0, seed=1, output_type="pt") | changes
    )
    return pipe(**settings, share=share).images


def same(ours, theirs, dtype=torch.float32):
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= TOLERANCE[dtype]


def check(pipe, dtype, **changes):
    plain, shared = draw(pipe, False, **changes), draw(pipe, True, **changes)
    same(shared, plain, dtype)
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


@pytest.mark.parametrize("alone", ["SharedRows", "KeptProjections", "FoldedEnlargements", "nothing"])
def test_each_alone(pipe, monkeypatch, alone):
    """With the other savings switched off, every one still gives the same picture."""
    pipe.to(torch.float64)
    every = savings.exact_helpers

    def chosen(vouched):
        helpers = every(vouched)
        assert len(helpers) == 3
        return [helper for helper in helpers if type(helper).__name__ == alone]

    monkeypatch.setattr(savings, "exact_helpers", chosen)
    check(pipe, torch.float64, **MIXED)


class Storing(AttnProcessor2_0):
    """A processor that keeps something of what it is given, and writes into a dictionary of the caller's."""

    def __init__(self, name=""):
        super().__init__()
        self.name = name

    def __call__(self, attn, hidden_states, *args, store=None, **kwargs):
        if store is not None:
            store[self.name] = len(hidden_states)
        return super().__call__(attn, hidden_states, *args, **kwargs)


class Wrapped(nn.Module):
    """What a library puts in a layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *rest, **others):
        # Depends on the whole batch, as a quantised layer's range does.
        return self.layer(x, *rest, **others) * (1 + x.abs().max() * 1e-3)


def add_lora(pipe, **settings):
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", **settings)
    pipe.unet.add_adapter(config, adapter_name="ink")
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    pipe.unet.requires_grad_(False)


def own_processors(pipe):
    pipe.unet.set_attn_processor({name: Storing(name) for name in pipe.unet.attn_processors})


def wrap_encoder_layer(pipe):
    block = pipe.unet.down_blocks[1].resnets[0]
    block.conv1 = Wrapped(block.conv1)


def hook_on_a_block(pipe):
    """A hook that reads the batch as a whole."""

    def mean_of_the_batch(module, args, output):
        return output + output.mean(0, keepdim=True) * 0.1

    pipe.unet.mid_block.resnets[0].register_forward_hook(mean_of_the_batch)


def hook_before_the_unet(pipe):
    """A hook that makes the halves different."""
    noise = torch.randn(2, 4, 8, 8)
    pipe.unet.register_forward_pre_hook(lambda module, args: (args[0] + noise, *args[1:]))


def wrap_forward(pipe):
    block = pipe.unet.down_blocks[0].resnets[0]
    inner = block.forward
    block.forward = lambda x, *rest, **others: inner(x, *rest, **others) + x.mean(0, keepdim=True)


def offload_sequentially(pipe):
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def ip_adapter(pipe):
    weights, key = {}, 1
    for name in pipe.unet.attn_processors:
        if not name.endswith("attn1.processor"):
            wide = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            weights |= {f"{key}.to_{kind}_ip.weight": torch.randn(wide, 32) for kind in "kv"}
            key += 2
    projection = {
        "proj.weight": torch.randn(128, 32),
        "proj.bias": torch.zeros(128),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])


def scheduler(kind, **settings):
    def use(pipe):
        known = {k: v for k, v in SD15_SCHEDULE.items() if k.startswith(("num", "beta", "prediction"))}
        pipe.scheduler = kind(**known, **settings)

    return use


class NoisyScheduler(DDIMScheduler):
    """Not one of diffusers': halves of what it scales are not the same."""

    def scale_model_input(self, sample, timestep=None):
        return sample + 0.1 * torch.linspace(0, 1, len(sample)).view(-1, 1, 1, 1)


def change_weights(pipe, i, t, tensors):
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.data.mul_(1.02 if i == 0 else 1 / 1.02)
    return tensors


def change_texts(pipe, i, t, tensors):
    tensors["prompt_embeds"].data.mul_(torch.linspace(0.5, 1, len(tensors["prompt_embeds"])).view(-1, 1, 1))
    return tensors


def swap_processors(pipe, i, t, tensors):
    own_processors(pipe)
    return tensors


def put_a_hook(pipe, i, t, tensors):
    if i == 0:
        hook_on_a_block(pipe)
    return tensors


IMAGES = [torch.cat([torch.zeros(1, 1, 32), torch.linspace(-1, 1, 32).view(1, 1, 32)])]
#: What is done to the pipeline, and what it is called with.
CONDITIONS = {
    "plain": (None, {}),
    "mixed": (None, MIXED),
    "no guidance": (None, dict(guidance_scale=1.0)),
    "branch off": (None, dict(branch_scale=0.0)),
    "window": (None, dict(branch_start=0.3, branch_end=0.7, num_inference_steps=5)),
    "guidance rescaled": (None, dict(guidance_rescale=0.7)),
    "stochastic": (None, dict(eta=0.7)),
    "ancestral sampler": (scheduler(EulerAncestralDiscreteScheduler), {}),
    "second-order sampler": (scheduler(HeunDiscreteScheduler), dict(num_inference_steps=3)),
    "sampler of others": (scheduler(NoisyScheduler), {}),
    "long prompt beside a short one": (None, dict(prompt=["龙", "月饼，" * 40])),
    "long English beside short": (None, dict(prompt=["龙", "龙"], prompt_en=["", "a cat " * 60])),
    "other size": (None, dict(height=32, width=96)),
    "IP-Adapter": (ip_adapter, dict(ip_adapter_image_embeds=IMAGES)),
    "attention processors of others": (own_processors, {}),
    "arguments for processors": (own_processors, dict(cross_attention_kwargs={"store": {0: 1}})),
    "sliced attention": (lambda pipe: pipe.enable_attention_slicing(), {}),
    "FreeU": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), {}),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(), {}),
    "LoRA of peft": (lambda pipe: add_lora(pipe, target_modules=["to_k", "to_v", "conv1"]), {}),
    "DoRA of peft": (lambda pipe: add_lora(pipe, target_modules=["conv1"], use_dora=True), {}),
    "a layer of another library": (wrap_encoder_layer, {}),
    "a hook on a block": (hook_on_a_block, {}),
    "a hook before the UNet": (hook_before_the_unet, {}),
    "a wrapped forward": (wrap_forward, {}),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), {}),
    "sequential offload": (offload_sequentially, {}),
    "weights changed by a callback": (None, dict(callback_on_step_end=change_weights)),
    "texts changed by a callback": (
        None,
        dict(
            callback_on_step_end=change_texts, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
        ),
    ),
    "processors changed by a callback": (None, dict(callback_on_step_end=swap_processors)),
    "a hook put on by a callback": (None, dict(callback_on_step_end=put_a_hook)),
    "channels last": (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), {}),
    "tiled VAE": (lambda pipe: pipe.vae.enable_tiling(), dict(height=128, width=128)),
}


@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_in_every_condition(pipe, condition, optimized):
    prepare, settings = CONDITIONS[condition]
    settings = dict(num_inference_steps=3) | settings
    other = copy.deepcopy(pipe)
    if optimized:
        pipe.optimize()
    for one in (pipe, other):
        torch.manual_seed(7)
        if prepare is not None:
            prepare(one)
    torch.manual_seed(7)
    plain = draw(other, False, **settings)
    torch.manual_seed(7)
    same(draw(pipe, True, **settings), plain)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_in_other_modes(pipe, context):
    with context():
        plain, shared = draw(pipe, False), draw(pipe, True)
    assert (shared.float() - plain.float()).abs().max() <= (3e-5 if plain.dtype == torch.float32 else 0)
    assert not any(weight.is_inference() for part in (pipe.unet, pipe.branch) for weight in part.parameters())


VARIANTS = {
    "image to image": (BridgeImg2ImgPipeline, dict(strength=0.6)),
    "inpainting": (BridgeInpaintPipeline, dict(mask_image=torch.ones(1, 1, 64, 64))),
    "ControlNet": (BridgeControlNetPipeline, dict()),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(pipe, variant):
    from community_files import make_controlnet

    kind, settings = VARIANTS[variant]
    more = {"controlnet": make_controlnet(pipe.unet)} if variant == "ControlNet" else {}
    other = kind(**pipe.components, **more)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    check(other, torch.float32, image=picture, num_inference_steps=4, **settings)


def stock_pipeline(pipe, kind=StableDiffusionPipeline):
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    stock = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionPAGPipeline])
def test_stock_pipelines_with_the_bridge(pipe, kind, guidance):
    stock = stock_pipeline(pipe, kind)
    condition = NativeCondition(*pipe.native_text_encoder.encode(["龙", "坏"]).detach().split(1))

    def drawn(share):
        bridge = Bridge(pipe.branch, share).attach(stock.unet)
        with bridge.condition(condition):
            picture = stock(
                "", guidance_scale=guidance, num_inference_steps=3, output_type="pt",
                generator=torch.Generator().manual_seed(1),
            ).images  # fmt: skip
        bridge.detach()
        return picture

    same(drawn(True), drawn(False))


@pytest.mark.parametrize(
    ("settings", "calls", "rows"),
    [
        (dict(), 2, {2}),
        (dict(guidance_scale=1.0), 2, {1}),
        (dict(branch_scale=0.0), 0, set()),
        (dict(branch_start=0.5), 1, {2}),
        (dict(branch_end=0.5), 1, {2}),
    ],
)
def test_branch_works_only_where_it_counts(pipe, settings, calls, rows):
    """Off, it is not run; without guidance, nothing is doubled."""
    seen = []
    handle = pipe.branch.mid_block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    check(pipe, torch.float32, **settings)
    handle.remove()
    assert len(seen) == 2 * calls, "once plain, once shared"
    assert set(seen) == rows


def test_a_tiny_vae_is_left_alone(pipe):
    widths = (8, 8, 8, 8)
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).eval()
    check(pipe, torch.float32)
