"""Comparisons with a peer.

Both sides compute the same, differences are caught, figures are what they claim to be.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdm.bench.compare import OURS, Bench, Outcome, Side, compare, count_flops, relative_error
from bdm.bench.decode import DecodeBench
from bdm.bench.gpu import run_gpu
from bdm.bench.infer import InferBench
from bdm.bench.run import run_bench, summary, table
from bdm.bench.train import TrainBench
from bdm.config import (
    BenchConfig,
    BenchDecodeConfig,
    BenchGpuConfig,
    BenchInferConfig,
    BenchScaleConfig,
    BenchTrainConfig,
)
from bdm.errors import UserError
from bdm.speed import folding

TINY = dict(
    out="unused",
    pairs=2,
    latents=8,
    native_width=48,
    threads=1,
    dtype="float64",
    unet=dict(
        block_out_channels=(16, 16, 32, 32), cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8
    ),
    vae=dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
)
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


class Fixed(Bench):
    """Sides of known results."""

    peers = ("peer",)

    def __init__(self, ours):
        self.results = {OURS: ours, "peer": torch.tensor([1.0, 2.0])}
        self.timed = []

    def side(self, name, count=True):
        def seconds():
            self.timed.append(name)
            return {OURS: 2.0, "peer": 3.0}[name]

        return Side(seconds, lambda: self.results[name], 10)

    def memory(self, name):
        return {OURS: 100, "peer": 200}[name]


def settings(**changes):
    return BenchConfig(**dict(out="unused", pairs=3, warm_up=0) | changes)


def test_sides_that_disagree_are_not_timed():
    bench = Fixed(torch.tensor([1.0, 2.001]))
    with pytest.raises(UserError, match="differ by 5.0e-04 relative"):
        compare(bench, settings())
    assert bench.timed == []
    with pytest.raises(UserError, match="differ by nan"):
        compare(Fixed(torch.tensor([1.0, float("nan")])), settings())


def test_sides_take_turns_and_figures_follow():
    bench = Fixed(torch.tensor([1.0, 2.0]))
    outcome = compare(bench, settings(), say=lambda _: None)
    assert bench.timed == ["peer", OURS, OURS, "peer", "peer", OURS]
    figures = summary(bench, outcome)
    assert figures["ratio"] == 1.5
    assert figures["pairs"] == [1.5] * 3
    assert figures["peak_memory_ratio"] == 0.5
    assert figures["max_relative_error"] == 0.0
    assert "peer" in table(outcome)


def test_share_of_the_best_rate():
    outcome = Outcome({"peer": [2.0], OURS: [1.0]}, {"peer": 100, OURS: 50}, {"peer": 0, OURS: 0}, 0.0, 100.0)
    assert [line.split("%")[0][-3:].strip() for line in table(outcome).splitlines()[1:3]] == ["50", "50"]


def test_operations_that_are_not_counted_are_no_zero():
    outcome = Outcome(
        {"peer": [2.0], OURS: [1.0]}, {"peer": None, OURS: 50 * 10**9}, {"peer": 1, OURS: 1}, 0.0, 1e11
    )
    peer, ours = table(outcome).splitlines()[1:3]
    assert "not counted" in peer
    assert "%" not in peer
    assert "50.0      50%" in ours
    assert summary(Fixed(torch.ones(2)), outcome)["gflop"] == {"peer": None, OURS: 50.0}


def test_guided_drawing_equals_the_peer_with_less_work():
    config = BenchInferConfig(kind="infer", **TINY | dict(steps=2, batch=2, decode=True))
    bench = InferBench(config)
    ours, unprepared, peer = (bench.side(name) for name in (OURS, "bdm unprepared", "diffusers"))
    for side in (ours, unprepared):
        torch.testing.assert_close(side.result(), peer.result(), rtol=0, atol=1e-10)
    assert ours.flops == unprepared.flops < peer.flops
    assert peer.seconds() > 0


def test_decoding_equals_the_peer_with_less_work(monkeypatch):
    monkeypatch.setattr(folding, "LEAST_FLOPS", 0)
    bench = DecodeBench(BenchDecodeConfig(kind="decode", **TINY))
    ours, peer = bench.side(OURS), bench.side("diffusers")
    torch.testing.assert_close(ours.result(), peer.result(), rtol=0, atol=1e-12)
    enlarged = [block.upsamplers[0].conv for block in bench.vae.decoder.up_blocks if block.upsamplers]
    # Of 36 products for a pixel before it is enlarged and a pair of channels, 20 are spared.
    pixels = [(8 * 2**i) ** 2 for i in range(len(enlarged))]
    spared = sum(
        2 * 20 * n * conv.in_channels * conv.out_channels for n, conv in zip(pixels, enlarged, strict=True)
    )
    assert 0.95 < (peer.flops - ours.flops) / spared <= 1.0, "folding the kernels is counted too"


def test_training_step_gives_the_peers_gradient():
    config = BenchTrainConfig(kind="train", text=TEXT, native_text=TEXT | dict(hidden_size=48), **TINY)
    bench = TrainBench(config)
    sides = {name: bench.side(name) for name in (*bench.peers, OURS)}
    results = [side.result() for side in sides.values()]
    assert results[0][1:].abs().max() > 0
    for result in results[1:]:
        assert relative_error(result[1:], results[0][1:]) < 1e-6, "the loss is in float32 on all sides"
    assert sides[OURS].flops == sides["recipe with caches"].flops < sides["recipe"].flops
    before = sides[OURS].result()
    sides[OURS].seconds()
    assert not torch.equal(sides["recipe"].result(), before), "all sides train the same parameters"


def test_counted_operations():
    a = torch.randn(8, 16)
    assert count_flops(lambda: a @ a.T) == 2 * 8 * 16 * 8


def test_peak_memory():
    # A process of its own: where the system does not let a peak start again, this one's may be an
    # earlier test's.
    script = (
        "import torch; from bdm.bench.memory import peak_memory; small = peak_memory(lambda: None); "
        "print(peak_memory(lambda: torch.ones(2**28).sum()) - small)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.9 * 2**30 < int(ran.stdout) < 1.2 * 2**30


def check_comparison(tmp_path, capsys):
    config = BenchInferConfig(kind="infer", **TINY | dict(out=tmp_path, dtype="float32", pairs=1))
    run_bench(config)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["max_relative_error"] < 3e-5
    assert 0.5 < figures["peak_memory_ratio"] < 1.5
    assert json.loads((tmp_path / "bench.json").read_text()) == figures
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_comparison_from_configuration_to_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(InferBench, "memory", lambda self, name: 100)
    check_comparison(tmp_path, capsys)


def test_scaling_curve(tmp_path, capsys, monkeypatch):
    """Every side draws every number of pictures, and the figures are a picture's, not a call's."""
    drawn = []

    def side(self, name, count=True):
        def seconds():
            drawn.append((name, self.config.batch))
            return {OURS: 1.0, "diffusers": 3.0}[name] * self.config.batch

        return Side(seconds, lambda: torch.ones(1))

    monkeypatch.setattr(InferBench, "side", side)
    settings = TINY | dict(out=tmp_path, kind="scale", batches=(1, 4), peers=("diffusers",))
    run_bench(BenchScaleConfig(**settings))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["seconds_per_picture"] == {"diffusers": {"1": 3.0, "4": 3.0}, OURS: {"1": 1.0, "4": 1.0}}
    assert figures["ratio"] == {"1": 3.0, "4": 3.0}
    assert {(name, batch) for name, batch in drawn} == {
        (name, batch) for name in ("diffusers", OURS) for batch in (1, 4)
    }
    assert (tmp_path / "bench.png").stat().st_size > 5000


@pytest.mark.slow
def test_whole_comparison(tmp_path, capsys):
    """Memory too, which each side's own process measures."""
    check_comparison(tmp_path, capsys)


def gpu_config(tmp_path, **changes):
    decode = TINY | {"kind": "decode", "pairs": 1, "warm_up": 0}
    decode.pop("out")
    own = dict(kind="gpu", out=tmp_path, device="cpu", tests=None, benches={"decode": decode})
    return BenchGpuConfig(**own | changes)


def test_everything_for_a_gpu_ends_in_one_line_whatever_fails(tmp_path, capsys):
    """Tests that fail, a bench that crashes and one that takes too long end none of the rest."""
    commands = []

    def fake(command, seconds):
        commands.append(command)
        if "pytest" in command:
            return 1, "F...\n1 failed, 3 passed in 2.00s"
        text = Path(command[-1]).read_text(encoding="utf-8")
        if "seed: 1" in text:
            return None, ""
        if "seed: 2" in text:
            return 139, ""
        return 0, 'a table\n{"ratio": 1.5, "threads": 1}\n'

    benches = {f"b{seed}": {"kind": "decode", "seed": seed} for seed in range(3)}
    with pytest.raises(UserError, match=r"failed: tests, b1, b2"):
        run_gpu(gpu_config(tmp_path, tests=("tests/gpu",), benches=benches), fake)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    figures = json.loads(line)
    assert figures == json.loads((tmp_path / "gpu.json").read_text())
    assert figures["tests"]["failed"] == 1
    assert figures["tests"]["passed"] == 3
    assert figures["b0"] == {"ratio": 1.5}
    assert figures["b1"] == {"failed": "the time was over"}
    assert "exit status 139" in figures["b2"]["failed"]
    assert len(commands) == 4
    with pytest.raises(ValueError, match="benches.x: kind is 'gpu'"):
        gpu_config(tmp_path, benches={"x": {"kind": "gpu"}})


def test_no_time_is_overdrawn(tmp_path):
    figures = run_gpu(gpu_config(tmp_path, seconds=1.0), lambda *_: pytest.fail("begun"))
    assert figures["decode"] == {"left_out": "no time was left"}


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu_takes_the_same_way(tmp_path):
    figures = run_gpu(gpu_config(tmp_path))
    assert figures["decode"]["ratio"] > 0
