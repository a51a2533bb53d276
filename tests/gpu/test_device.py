"""What a GPU computes is what the CPU does.

Each test runs on the CPU always, and on a GPU where there is one: ``make gpu`` runs those.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_recipes import make_source, write_stock
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from bdm.config import RunConfig
from bdm.parallel.processes import make_accelerator
from bdm.parallel.strategies import ShardedStrategy
from bdm.training.loop import train
from bdm.training.metrics import read_metrics
from bdm.training.recipes.branch import branch_recipe
from bdm.training.states import load_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
only_on_a_gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _as_if_alone(monkeypatch):
    """Sums in full single precision, and nothing of a run before."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


#: Mean differences of pictures in [0, 1] that half precision may make in two steps.
HALF = {torch.bfloat16: 0.03, torch.float16: 0.01}


def draw(pipe, **changes):
    settings = dict(prompt=["龙", "红灯笼"], num_inference_steps=2, guidance_scale=5.0, seed=1)
    return pipe(**settings | changes, output_type="pt").images.float().cpu()


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_pictures_in_half_precision_are_those_of_single(pipe, device, dtype):
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("a CPU draws in bfloat16")
    plain = draw(pipe)
    pictures = draw(pipe.to(device, dtype))
    assert pictures.isfinite().all()
    assert (pictures - plain).abs().mean() < HALF[dtype]


@on_devices
def test_the_device_draws_what_the_cpu_draws(pipe, device):
    plain = draw(pipe)
    torch.testing.assert_close(draw(pipe.to(device)), plain, atol=2e-2, rtol=0)


@on_devices
def test_optimized_pictures_are_the_same_and_undoing_leaves_nothing(pipe, device):
    pipe.to(device)
    plain = draw(pipe, prompt="龙")
    done = pipe.optimize()
    assert str(done)
    for _ in range(2):  # compiled blocks, and what is kept of the first call
        torch.testing.assert_close(draw(pipe, prompt="龙"), plain, atol=2e-2, rtol=0)
    done.undo()
    torch.testing.assert_close(draw(pipe, prompt="龙"), plain, atol=1e-3, rtol=0)


OFFLOAD = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "slices": lambda pipe, device: (pipe.to(device), pipe.vae.enable_slicing()),
}


@on_devices
@pytest.mark.parametrize("mode", OFFLOAD)
def test_low_memory_modes_draw_the_same(pipe, device, mode):
    if device == "cpu" and mode == "sequential":
        pytest.skip("accelerate copies every weight where both devices are one")
    plain = draw(pipe)
    OFFLOAD[mode](pipe, device)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), plain, atol=2e-2, rtol=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a backbone and a native text encoder."""
    from tiny import make_native

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpu")
    write_stock(path / "backbone")
    make_native().save_pretrained(path / "native")
    return str(path / "backbone"), str(path / "native")


def trained(models, out, precision):
    """The losses of three steps, and the state after them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    optimizer = dict(
        steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=0, mixed_precision=precision, ema_decay=0.5
    )
    recipe = branch_recipe(make_source(), *models, seed=3, grid_prompts=("龙",))
    recipe.validate, recipe.grid = dict, lambda: None
    run = RunConfig(
        out=out, recipe=dict(kind="branch", backbone=models[0], native_text_encoder=models[1]),
        data=dict(kind="emoji", limit=4), optimizer=optimizer, seed=3, log_every=1, validate_every=100,
        grid_every=100, checkpoint_every=2, trackers=(),
    )  # fmt: skip
    out.mkdir()
    train(run, recipe)
    return [row for row in read_metrics(out) if "loss" in row], load_state(out / "states")


@on_devices
def test_a_step_in_bf16_is_that_of_single_precision(models, tmp_path, device):
    """On a GPU the loop takes it by itself; the figures of its memory and its clock are there then."""
    plain, _ = trained(models, tmp_path / "fp32", "no")
    half, state = trained(models, tmp_path / "bf16", "bf16")
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in plain], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in state["ema"]["average"])
    assert all({"seconds/data", "seconds/forward", "loss/t0-250"} & set(row) for row in half)
    assert all(row["seconds/forward"] > 0 and row["seconds/backward"] > 0 for row in half)
    assert all(("memory/allocated" in row) == torch.cuda.is_available() for row in half)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for block in self.down_blocks:
            x = block(x).tanh()
        return x


@on_devices
def test_a_split_step_on_one_device_is_the_whole_one(device, tmp_path):
    """FSDP2 with a single process, its states and all."""
    x = torch.randn(4, 8, device=device)

    def step(split):
        torch.manual_seed(0)
        network = Network().to(device)
        make = lambda parts: torch.optim.AdamW([p for part in parts.values() for p in part.parameters()])  # noqa: E731
        optimizer = make({"network": network})
        if split:
            strategy = ShardedStrategy(make_accelerator("no", 1), "no")
            _, optimizer = strategy.distribute(network, {"network": network}, make)
        network(x).square().mean().backward()
        optimizer.step()
        if split:
            with strategy.whole_weights({"network": network}):
                return [p.detach().clone() for p in network.parameters()]
        return [p.detach().clone() for p in network.parameters()]

    whole = step(split=False)
    init_process_group(
        "nccl" if device == "cuda" else "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    try:
        for ours, theirs in zip(step(split=True), whole, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    finally:
        destroy_process_group()


@only_on_a_gpu
def test_the_plan_of_a_step_is_what_a_gpu_measures(tmp_path):
    """The planned peak, without what is assumed for CUDA itself, is within a tenth of a step's."""
    from tiny import make_native, make_unet

    from bdm.plan.fake_step import step_figures

    stock = write_stock(tmp_path / "backbone")
    # Wide enough that the allocator's own rounding is small beside it.
    make_unet(block_out_channels=(160, 320, 320, 320)).save_pretrained(stock / "unet")
    make_native().save_pretrained(tmp_path / "native")
    models = str(stock), str(tmp_path / "native")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    rows, _ = trained(models, tmp_path / "out", "no")
    measured = max(row["memory/allocated"] for row in rows) * 2**30 - before
    run = RunConfig(
        out=tmp_path / "plan", recipe=dict(kind="branch", backbone=models[0], native_text_encoder=models[1]),
        data=dict(kind="emoji", limit=4, size=64), optimizer=dict(steps=3, batch_size=4, learning_rate=1e-3,
        warmup_steps=0),
    )  # fmt: skip
    planned = step_figures(run, 4, validate=False).peak
    assert measured == pytest.approx(planned, rel=0.1, abs=64 * 2**20)
