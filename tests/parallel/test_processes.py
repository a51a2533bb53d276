"""The same run by one process, by replicas (DDP), by shards (FSDP2) and by DeepSpeed's ZeRO.

Real processes over gloo.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from late_copies import copy_late
from launched import main
from tiny import make_native_model, make_unet, make_vae

from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import chinese_clip_tokenizer, clip_tokenizer
from bdm.training.metrics import read_metrics
from bdm.training.states import load_state, read_state, state_files
from bdm.training.stopping import Stopped

TESTS = Path(__file__).parents[1]

#: The variables by which a launcher tells processes how to share the work.
WAYS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp": {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
#: Slow, because on a CPU DeepSpeed compiles its communication first.
needs_deepspeed = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def make_models(path):
    """Tiny backbone and native text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    stock = StableDiffusionPipeline(
        make_vae(),
        CLIPTextModel(config).eval(),
        clip_tokenizer(),
        make_unet(),
        DDIMScheduler(**SD15_SCHEDULE),
        None,
        None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(path / "backbone")
    NativeTextEncoder(make_native_model(), chinese_clip_tokenizer()).save_pretrained(path / "native")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the frozen models of a kind of run are; made when first asked for."""
    path = tmp_path_factory.mktemp("models")

    def get(kind):
        if kind in ("branch", "stage_2") and not (path / "native").exists():
            make_models(path)
        if kind == "stage_2" and not (path / "one").exists():
            start("ddp", 1, "stage_1", path, path / "one")
        return path

    return get


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(way, processes, *arguments, **options):
    """Run ``launched.main`` in forked processes; forking saves them the imports."""
    port, children = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if processes > 1:
                    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
                    os.environ |= {key: str(value) for key, value in place.items()} | WAYS[way]
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                AcceleratorState._reset_state(True)
                main(*arguments, **options)
                status = 0
            except Stopped:
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


def losses(out):
    return torch.tensor([row["loss"] for row in read_metrics(out) if "loss" in row])


def tensors(tree, name=""):
    """The tensors of a state, by the path to them."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {key: value for k, v in items for key, value in tensors(v, f"{name}/{k}").items()}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The runs of one process, by kind."""
    runs = {}

    def get(kind):
        if kind not in runs:
            runs[kind] = tmp_path_factory.mktemp("runs") / kind
            start("ddp", 1, kind, folder(kind), runs[kind])
        return runs[kind]

    return get


slow = pytest.mark.slow
KINDS = ["tiny", pytest.param("branch", marks=slow)]
#: Who shares what. A second stage goes on with the first one's moments, which DeepSpeed cannot.
SHARED = [
    ("ddp", "tiny"),
    ("fsdp", "tiny"),
    ("ddp", "stage_2"),
    pytest.param("fsdp", "stage_2", marks=slow),
    pytest.param("ddp", "branch", marks=slow),
    pytest.param("fsdp", "branch", marks=slow),
    pytest.param("zero", "tiny", marks=needs_deepspeed),
    pytest.param("zero", "branch", marks=needs_deepspeed),
]


@pytest.mark.parametrize(("way", "kind"), SHARED)
def test_two_processes_give_the_curve_of_one(folder, alone, tmp_path, way, kind):
    """Losses, states and the finished weights, with the states in one layout."""
    checkpointing = {"branch": ["branch", "decoder"], "stage_2": ["unet", "text_encoder"]}
    start(
        way, 2, kind, folder(kind), tmp_path, accumulation=2, checkpointing=checkpointing.get(kind, [])
    )  # fmt: skip
    one = alone(kind)
    assert losses(one).std() > 0.01
    torch.testing.assert_close(losses(tmp_path), losses(one), atol=1e-4, rtol=0)
    figures = [next(row for row in read_metrics(out) if "loss" not in row) for out in (tmp_path, one)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)
    # Split gradients are added in another order, and Adam makes a step of the rounding where a gradient is
    # next to nothing, as in a whole UNet some are.
    atol = {"tiny": 1e-4, "branch": 3e-4}.get(kind, 1e-3) if way == "ddp" else 1e-3
    close = dict(atol=atol, rtol=1e-3)
    ours, theirs = (tensors(load_state(out / "states")) for out in (tmp_path, one))
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **close, msg=lambda text, name=name: f"{name}: {text}"
        )
    ours, theirs = (torch.load(out / "model/weights.pt") for out in (tmp_path, one))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **close)
    assert kind != "branch" or (tmp_path / "grids/0000006.png").exists()


def seen(out, stop, processes):
    """The examples in the order of the stream: process 0's share of each batch, then process 1's."""
    rows = [(out / f"seen-{stop}-{rank}.jsonl").read_text().splitlines() for rank in range(processes)]
    return [index for step in zip(*rows, strict=True) for row in step for index in json.loads(row)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("ddp", 2), ("ddp", 1)),
        (("fsdp", 2), ("ddp", 4)),
        (("ddp", 1), ("fsdp", 2)),
        pytest.param(("fsdp", 2), ("zero", 2), marks=needs_deepspeed),
        pytest.param(("zero", 2), ("ddp", 1), marks=needs_deepspeed),
    ],
)
def test_a_run_goes_on_with_other_processes(folder, alone, tmp_path, first, then, kind):
    """No example is repeated or lost, and the curve is the uninterrupted one's (nothing is drawn globally
    here).
    """
    start(*first, kind, folder(kind), tmp_path, stop=3)
    assert not (tmp_path / "model").exists()
    start(*then, kind, folder(kind), tmp_path)
    assert seen(tmp_path, 3, first[1]) + seen(tmp_path, 0, then[1]) == seen(alone(kind), 0, 1)
    torch.testing.assert_close(losses(tmp_path), losses(alone(kind)), atol=1e-4, rtol=0)


SHARDED = [
    (("fsdp", 2), ("ddp", 1), {}),
    (("ddp", 2), ("fsdp", 2), {}),
    pytest.param(("fsdp", 4), ("ddp", 2), {"ema_device": "cpu"}, marks=slow),
    pytest.param(("ddp", 1), ("fsdp", 4), {"ema_device": "cpu"}, marks=slow),
]


@pytest.mark.parametrize(("first", "then", "options"), SHARDED)
def test_a_state_in_pieces_holds_the_bits_of_one_in_a_file(
    folder, tmp_path, monkeypatch, first, then, options
):
    """The same run twice: written whole by one that waits, and in pieces by one that goes on before they are
    copied; then read by others and written whole again.
    """
    for name, sharded in (("whole", False), ("pieces", first[1] > 1)):
        if name == "pieces":
            copy_late(monkeypatch)
        own = dict(sharded_states=sharded, background_states=name == "pieces", checkpoint_every=1)
        start(
            *first, "tiny", folder("tiny"), tmp_path / name, run_options=tuple(own), steps=4, **own, **options
        )  # fmt: skip
    entry, _ = state_files(tmp_path / "pieces/states")
    if first[1] > 1:
        index = json.loads((entry / "index.json").read_text())
        assert len(index["files"]) == first[1] + 1, "each process wrote a file, and one says what is where"
        assert {path.name for path in entry.iterdir()} == {*index["files"], "index.json"}
    for step in range(2):  # the last two are kept
        one, pieces = (
            tensors(read_state(state_files(tmp_path / name / "states")[step])) for name in ("whole", "pieces")
        )
        assert list(one) == list(pieces)
        assert all(torch.equal(one[name], pieces[name]) for name in one)
    # No step is left to do; what was taken up is published by the others, bit for bit.
    start(*then, "tiny", folder("tiny"), tmp_path / "pieces", steps=4, **options)
    ours, theirs = (torch.load(tmp_path / name / "model/weights.pt") for name in ("whole", "pieces"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_process_that_cannot_write_leaves_the_state_before(folder, tmp_path, capfd):
    """All processes end in one line; what the others wrote is no state."""
    run = dict(sharded_states=True, run_options=("sharded_states", "checkpoint_every", "refuse"))
    with pytest.raises(AssertionError):
        start("fsdp", 2, "tiny", folder("tiny"), tmp_path, checkpoint_every=2, refuse=1, **run)
    assert "No space left" in capfd.readouterr().err
    assert [path.name for path in state_files(tmp_path / "states")] == ["step-00000002"]
    assert load_state(tmp_path / "states")["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--cpu"], ["--use_fsdp", "--fsdp_version", "2"]])
def test_accelerate_launch(folder, alone, tmp_path, arguments):
    """The launcher itself; on a machine without GPU, FSDP needs to be told to use the CPU."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
        *arguments,
        str(TESTS / "launched.py"),
        "branch",
        str(folder("branch")),
        str(tmp_path),
        "{}",
    ]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS.parent),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(losses(tmp_path), losses(alone("branch")), atol=1e-4, rtol=0)
