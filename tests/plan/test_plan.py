"""The plan of a run against real steps.

Memory as the allocator records it, operations as PyTorch counts them.
"""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from optimizer_names import NAMES
from tiny import make_native, make_text_encoder, make_unet, make_vae
from tiny_recipes import fresh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bdm.cli import main
from bdm.config import RunConfig, read_config
from bdm.data.batch import make_batch
from bdm.data.source import Example
from bdm.errors import UserError
from bdm.method.branch import BranchModel
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.plan import plan as planning
from bdm.plan.fake_device import FakeDevice
from bdm.plan.fake_step import STATE_BYTES, step_figures, train_and_freeze
from bdm.plan.meta_models import make_meta_backbone, make_meta_native_text_encoder
from bdm.plan.meta_recipe import CAPTION, BlankSource
from bdm.plan.operations import CountedOperations
from bdm.plan.plan import Machine, make_plan
from bdm.plan.sizes import GIB
from bdm.text.vocabulary import clip_tokenizer
from bdm.training.averaging import AveragedWeights
from bdm.training.optimizers import make_optimizer
from bdm.training.recipes.build import build_recipe

SIZE = 64


def write_models(folder, native, text_encoder, unet):
    stock = StableDiffusionPipeline(
        make_vae(),
        text_encoder,
        clip_tokenizer(),
        unet,
        DDIMScheduler(**SD15_SCHEDULE),
        None,
        None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(folder / "backbone")
    native.save_pretrained(folder / "native")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A branch run on tiny models, whose data do not exist."""
    folder = tmp_path_factory.mktemp("plan")
    write_models(folder, make_native(), make_text_encoder(), make_unet(layers_per_block=1))
    return branch_run(folder)


@pytest.fixture(scope="module")
def plain(run):
    """Its step of six samples."""
    return step_figures(run, 6, validate=False)


def branch_run(folder, size=SIZE, **recipe):
    models = dict(backbone=str(folder / "backbone"), native_text_encoder=str(folder / "native"))
    return RunConfig(
        out=folder / "out",
        recipe=dict(kind="branch", **models, **recipe),
        data=dict(kind="folder", path=folder, size=size),
        optimizer=dict(steps=1000, batch_size=12, learning_rate=1e-4),
    )


def real_recipe(run):
    pixels = torch.zeros(3, run.data.size, run.data.size, dtype=torch.uint8)
    return build_recipe(run, BlankSource(Example(CAPTION, pixels, english=CAPTION)))


def real_batch(recipe, count):
    return make_batch([(i, i, recipe.source[i]) for i in range(count)], 0)


def allocated(recipe, batch):
    """Bytes in use at most during a training step, as PyTorch's allocator records them, and the loss.

    The process's size would hold the allocator's and libraries' own caches too, which differ from machine to
    machine.
    """
    parts = train_and_freeze(recipe)
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    average = AveragedWeights(parameters, 0.9)

    def step():
        recipe(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step()
        optimizer.zero_grad()

    step()  # AdamW takes the memory of its states in its first step
    states = [value for state in optimizer.state.values() for value in state.values()]
    features = list(recipe.features.kept.values())
    kept = [*recipe.parameters(), *recipe.buffers(), *average.average, *states, *features]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def check_memory(run, count, figures=None):
    recipe = real_recipe(run)
    recipe.fill_caches(None) if not run.recipe.cache else recipe.features([CAPTION, ""])
    real = allocated(recipe, real_batch(recipe, count))
    planned = (figures or step_figures(run, count, validate=False)).peak
    print(f"\nplanned {planned / 2**20:.1f} MiB, real {real / 2**20:.1f} MiB, ratio {planned / real:.3f}")
    assert planned == pytest.approx(real, rel=0.15)


def test_memory_is_a_real_steps(run, plain):
    check_memory(run, 6, plain)


def test_a_pool_and_two_languages_can_be_planned(run, plain):
    """A step on another backbone holds the changed weights, and asks the backbone once or twice more."""
    bilingual = step_figures(branch_run(run.data.path, bilingual=0.5), 6, validate=False)
    assert bilingual.parameters["english_encoder"] > 0
    pooled = step_figures(branch_run(run.data.path, pool=dict(rank=1, share=1.0)), 6, validate=False)
    assert pooled.forward["unet"] > 1.9 * plain.forward["unet"]
    assert pooled.peak > bilingual.peak
    with pytest.raises(UserError, match="recipe.pool has files"):
        step_figures(branch_run(run.data.path, pool=dict(files=["ink.safetensors"])), 6)


@pytest.fixture(scope="module")
def first_stage(run, tmp_path_factory):
    """A finished first stage: a pipeline's folder with a text encoder of its own."""
    folder = tmp_path_factory.mktemp("first")
    recipe = dict(kind="native_text", backbone=run.recipe.backbone, native_text_encoder=fresh(folder / "voc"))
    first = RunConfig.model_validate(run.model_dump() | dict(recipe=recipe))
    real_recipe(first).save(folder / "model")
    return folder, first


@pytest.mark.parametrize("route", ["first stage", "second stage", "align"])
def test_memory_of_a_route_is_a_real_steps(run, first_stage, route):
    folder, first = first_stage
    second = dict(kind="native_text", backbone=run.recipe.backbone, start=str(folder))
    recipe = {
        "first stage": first.recipe.model_dump(),
        "second stage": second | dict(train=["text_encoder", "unet"]),
        "align": first.recipe.model_dump(include={"backbone", "native_text_encoder"}) | dict(kind="align"),
    }[route]
    planned = RunConfig.model_validate(run.model_dump() | dict(recipe=recipe))
    step = step_figures(planned, 6, validate=False)
    assert step.forward["unet"] > 0
    assert ("unet" in step.trained) == (route == "second stage")
    check_memory(planned, 6, step)


@pytest.mark.slow
def test_memory_is_a_real_steps_on_the_emoji_world():
    run = read_config("configs/emoji/branch.yaml", ["recipe.cache=false"], RunConfig)
    check_memory(run, run.optimizer.batch_size)


@pytest.mark.slow
def test_memory_is_a_real_steps_on_a_wide_network(tmp_path):
    """SD1.5's latent size at a fifth of its width: attention and wide maps take most of the memory."""
    unet = make_unet(sample_size=64, block_out_channels=(64, 128, 256, 256), attention_head_dim=8)
    write_models(tmp_path, make_native(), make_text_encoder(), unet)
    check_memory(branch_run(tmp_path, size=512), 2)


def count_operations(recipe, checkpointing=()):
    """Of the forward and of the backward pass, counted while they run."""
    train_and_freeze(recipe, checkpointing)
    with CountedOperations() as forward:
        loss = recipe(real_batch(recipe, 6))["loss"]
    with CountedOperations() as backward:
        loss.backward()
    assert not forward.operations.uncounted | backward.operations.uncounted
    return forward.total, backward.total


def test_operations_are_a_real_steps(run, plain):
    forward, backward = count_operations(real_recipe(run))
    # PyTorch's own counter, which knows the products that attention is made of.
    recipe = real_recipe(run)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        recipe(real_batch(recipe, 6))
    assert counter.get_total_flops() == forward
    assert sum(plain.forward.values()) * 6 == forward
    assert plain.backward * 6 == backward
    # The branch's backward pass takes twice its forward pass, the frozen decoder's once, the frozen encoder's
    # nothing.
    assert 2 * plain.forward["branch"] < plain.backward < 2 * plain.forward["branch"] + plain.forward["unet"]
    assert plain.encoding == plain.forward["vae"] + plain.forward["native_text_encoder"]


PLUGINS = {"lora": {}, "embedding": {}, "controlnet": dict(widths=(8, 16, 16, 32)), "checkpoint": {}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLUGINS)
def test_operations_of_community_recipes_are_a_real_steps(run, kind):
    recipe = dict(kind=kind, backbone=run.recipe.backbone, **PLUGINS[kind])
    run = RunConfig.model_validate(run.model_dump() | dict(recipe=recipe))
    step = step_figures(run, 6, validate=False)
    forward, backward = count_operations(real_recipe(run))
    assert sum(step.forward.values()) * 6 == pytest.approx(forward)
    assert step.backward * 6 == pytest.approx(backward)


@pytest.mark.parametrize("trained", [True, False])
def test_operations_by_hand(trained):
    """2 x multiplications.

    The backward pass takes as many for the inputs and, if they are trained, for the weights.
    """
    fake = FakeDevice()
    convolution = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(trained)
    projection = nn.Linear(16, 16, bias=False).requires_grad_(trained)
    with fake:
        for module in (convolution, projection):
            fake.place(module, lambda _: "weights")
        picture, words = fake.blank(2, 3, 8, 8).requires_grad_(), fake.blank(2, 4, 7, 16).requires_grad_()
        y = convolution(picture)
        q = projection(words)
        z = nn.functional.scaled_dot_product_attention(q, words, words)
        conv, linear, attention = (
            2 * 2 * 64 * 5 * 3 * 9,
            2 * (2 * 4 * 7) * 16 * 16,
            2 * 2 * (2 * 4) * 7 * 7 * 16,
        )
        assert fake.flops.total() == conv + linear + attention
        fake.flops.clear()
        (y.sum() + z.sum()).backward()
    # Fused attention works its weights out again: five matrix products instead of two.
    assert fake.flops.total() == (conv + linear) * (1 + trained) + attention * 5 / 2


def test_activations_are_what_autograd_saves(run, plain):
    recipe = real_recipe(run)
    train_and_freeze(recipe)
    own = {t.untyped_storage().data_ptr() for t in (*recipe.parameters(), *recipe.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    batch = real_batch(recipe, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = recipe(batch)["loss"]
    real = sum(storage.nbytes() for storage in saved.values())
    assert loss.requires_grad
    assert sum(plain.activations.values()) == pytest.approx(real, rel=0.03)


def test_checkpointing_trades_memory_for_operations(run, plain):
    checkpointed = run.model_copy(
        update={"optimizer": run.optimizer.model_copy(update={"checkpointing": ("branch",)})}
    )
    saving = step_figures(checkpointed, 6, validate=False)
    assert saving.activations["branch"] < 0.5 * plain.activations["branch"]
    assert saving.activations["unet"] == plain.activations["unet"]
    assert plain.backward < saving.backward
    assert saving.backward * 6 == count_operations(real_recipe(checkpointed), ["branch"])[1]
    assert saving.peak < plain.peak


def test_mixed_precision_halves_activations_and_keeps_the_optimizer(run, plain):
    half = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"mixed_precision": "bf16"})})
    full, mixed = plain, step_figures(half, 6, validate=False)
    assert (
        mixed.at_peak["optimizer states"]
        == full.at_peak["optimizer states"]
        == 2 * full.at_peak["trained weights"]
    )
    assert mixed.forward == full.forward
    # Normalisations stay in float32, so it is less than half.
    assert 0.5 < mixed.activations["unet"] / full.activations["unet"] < 1.0


def test_what_stays_from_step_to_step_is_counted_exactly(run, plain):
    recipe = real_recipe(run)
    frozen = [
        t
        for t in (*recipe.parameters(), *recipe.buffers())
        if t not in set(recipe.denoiser.branch.parameters())
    ]
    trained = sum(p.nbytes for p in recipe.denoiser.branch.parameters())
    assert plain.at_peak["trained weights"] == plain.at_peak["moving average"] == trained
    assert plain.at_peak["optimizer states"] == 2 * trained
    assert plain.at_peak["frozen weights"] == sum(t.nbytes for t in frozen)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_an_optimizers_state(name):
    weight = nn.Parameter(torch.ones(512, 512))
    optimizer = make_optimizer(name, [weight], 1e-3)
    weight.sum().backward()
    optimizer.step()
    size = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert size / weight.numel() == pytest.approx(STATE_BYTES[name], rel=0.03)


def test_nothing_stays_in_memory():
    """What a step takes beyond the gradients is given back: nothing is counted twice or forgotten."""
    fake = FakeDevice()
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 3))
    with fake:
        fake.place(layers, lambda _: "weights")
        before = fake.live.total()
        assert before == sum(p.numel() * 4 for p in layers.parameters())
        layers(fake.blank(2, 3, 16, 16)).sum().backward()
        assert fake.live.total() == 2 * before
        assert fake.peak > 2 * before


def test_full_size_without_weights():
    unet = make_meta_backbone("stable-diffusion-v1-5/stable-diffusion-v1-5").unet
    native = make_meta_native_text_encoder("OFA-Sys/chinese-clip-vit-huge-patch14")
    with torch.device("meta"):
        branch = BranchModel.from_backbone(unet, native.text_dim)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in branch.parameters()) == 363_141_760
    assert native.text_dim == 1024


@pytest.mark.slow
def test_the_real_run():
    """The backbone's forward pass takes 803 G at 64x64 latents, as is known of SD1.5's UNet."""
    run = read_config("configs/sd15_chinese_clip.yaml", ["optimizer.accumulation=100"], RunConfig)
    step = step_figures(run, 4, processes=8, validate=False)
    assert step.forward["unet"] == pytest.approx(803.3e9, rel=0.001)
    assert step.moments == (8, 64, 64)
    assert step.features == (52, 1024)
    assert step.at_peak["optimizer states"] == 2 * 4 * 363_141_760


def plan_json(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


@pytest.fixture
def config(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(run.model_dump_json())
    return path


def test_command_prints_a_table_and_json(config, capsys):
    machine = [
        "--gpus",
        2,
        "--gpu-tflops",
        100,
        "--utilisation",
        0.5,
        "--price-per-hour",
        3,
        "--samples",
        1_000_000,
    ]
    table, facts = plan_json(capsys, config, *machine)
    speed = facts["speed"]["as_configured"]
    flops = facts["flops_per_sample"]["total"]
    assert speed["samples_per_second"] == pytest.approx(2 * 100e12 * 0.5 / flops)
    assert speed["days_of_one_pass"] == pytest.approx(1e6 / speed["samples_per_second"] / 86400)
    assert speed["cost_of_the_run"] == pytest.approx(speed["days_of_the_run"] * 24 * 2 * 3)
    assert facts["run_samples"] == 12_000
    assert facts["disk"]["VAE moments (fp16)"] == 1_000_000 * 2 * 8 * 8 * 8
    assert facts["disk"]["text features (fp16)"] == 1_000_000 * 2 * 52 * 48
    assert facts["memory_total"] == pytest.approx(sum(facts["memory"].values()), abs=20)
    assert facts["memory"]["buckets of gradients"] == facts["memory"]["trained weights"]
    assert facts["fits"]
    assert "fits, " in table
    assert facts["speed"]["from_caches"]["samples_per_second"] > speed["samples_per_second"]


def test_without_operations_there_is_no_time_and_no_cost(run, config, plain, capsys, monkeypatch):
    step = dataclasses.replace(plain, uncounted=("attention", "aten::new_mm"))
    monkeypatch.setattr(planning, "step_figures", lambda *_, **__: step)
    table, facts = plan_json(capsys, config, "--samples", 1000, "--price-per-hour", 3)
    assert "not counted, because PyTorch" in table
    assert "(attention, aten::new_mm)" in table
    assert "days" not in table
    assert "cost " not in table.replace("time and cost:", "")
    assert facts["flops_per_sample"]["total"] is facts["flops_per_sample"]["backward"] is None
    assert facts["flops_per_sample"]["not_counted"] == ["attention", "aten::new_mm"]
    assert facts["speed"] == {}
    assert facts["memory_total"] > 0


def with_batch(run, **changes):
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update=changes)})


def check_fit(run):
    """Advice for a GPU between what one sample and what the whole batch takes."""
    whole = make_plan(run, Machine(), samples=1000)
    least = make_plan(with_batch(run, accumulation=run.optimizer.batch_size), Machine(), samples=1000)
    small = Machine(memory=(0.4 * least.total_memory + 0.6 * whole.total_memory) / GIB)
    plan = make_plan(run, small, samples=1000)
    assert not plan.fits
    assert plan.fit is not None
    assert plan.fit.micro_batch * plan.fit.accumulation == run.optimizer.batch_size
    assert 1 < plan.fit.micro_batch < run.optimizer.batch_size
    again = make_plan(with_batch(run, accumulation=plan.fit.accumulation), small, samples=1000)
    assert again.fits
    assert again.total_memory == plan.fit.memory
    larger = min(n for n in range(plan.fit.micro_batch + 1, 999) if run.optimizer.batch_size % n == 0)
    assert not make_plan(
        with_batch(run, accumulation=run.optimizer.batch_size // larger), small, samples=1000
    ).fits
    assert make_plan(run, Machine(memory=0.01), samples=1000).fit is None


def test_a_batch_that_does_not_fit_gets_advice_that_does(run, plain, monkeypatch):
    """Steps whose memory grows with the batch, above what validation takes."""

    def measured(run, batch, processes):
        return dataclasses.replace(
            plain, batch=batch, peak=batch * GIB, at_peak={"all": batch * GIB}, validation_peak=3 * GIB
        )

    monkeypatch.setattr(planning, "step_figures", measured)
    check_fit(run)


@pytest.mark.slow
def test_a_real_batch_that_does_not_fit_gets_advice_that_does(run):
    check_fit(with_batch(run, batch_size=128))  # more than the samples of a validation


def test_what_cannot_be_planned_is_said(run, config, capsys, monkeypatch):
    with pytest.raises(UserError, match="give its size with --samples"):
        make_plan(run, Machine())
    clip = dict(kind="contrastive", architecture="clip", text={}, vision={})
    for changes, said in (
        (dict(data=dict(kind="prepared", path="x")), "raw data"),
        (dict(recipe=clip), "picks pairs"),
    ):
        with pytest.raises(UserError, match=said):
            step_figures(RunConfig.model_validate(run.model_dump() | changes), 2)
    with pytest.raises(UserError, match="5 GPUs"):
        make_plan(run, Machine(gpus=5), samples=10)
    for wrong in (dict(gpus=0), dict(utilisation=1.5), dict(tflops=math.nan), dict(price=-1.0)):
        with pytest.raises(UserError):
            Machine(**wrong)
    assert main(["plan", str(config), "--samples", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="known without it are"):
        make_meta_backbone("somebody/some-model")
