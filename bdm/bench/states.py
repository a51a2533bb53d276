"""How long a state keeps training waiting: written while it waits, and in the background.

Seconds are those that a thread works, or waits for the disk, the interpreter or another thread. While it
could go on and others have the processors, as on a shared machine, nothing is counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BenchStatesConfig
from ..extras import require_packages
from ..parallel.whole import collected, on_cpu, whole
from ..training.states import StateWriter, save_state

#: Numbers of a tensor of the state, as many as a middle layer of SD1.5 has.
LAYER = 640 * 640 * 9
#: Seconds of steps before and behind a state, by which their speed without one is known.
AROUND = 2.0


def measure(config: BenchStatesConfig) -> dict[str, Any]:
    """The stalls of a training thread, in pairs, one of each way."""
    count = max(1, config.megabytes * 2**20 // (4 * LAYER))
    weights = [torch.randn(LAYER) for _ in range(count)]
    waiting, background = [], []
    with tempfile.TemporaryDirectory(prefix="bdm-bench-states-", dir=config.folder) as name:
        writer = StateWriter()
        try:
            for turn in range(config.warm_up + config.pairs):
                alone = _waiting(Path(name), turn, weights)
                beside = _background(Path(name), turn, weights, writer, config.step_seconds)
                if turn >= config.warm_up:
                    waiting.append(alone)
                    background.append(beside)
        finally:
            writer.close()
    ratios = [b["stall"] / w for w, b in zip(waiting, background, strict=True)]
    return {
        "megabytes": round(count * LAYER * 4 / 2**20),
        "waiting_s": statistics.median(waiting),
        "step_s": config.step_seconds,
        **{
            f"{part}_s": statistics.median(b[part] for b in background)
            for part in ("begun", "copied", "slower", "stall", "written")
        },
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def clock() -> float:
    """Seconds of this thread, without those that it was ready and had no processor (Linux)."""
    try:
        ready = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        ready = 0.0
    return time.perf_counter() - ready


def _waiting(folder: Path, turn: int, weights: list[Tensor]) -> float:
    """Seconds that training waits for a state that it writes itself."""
    begin = clock()
    save_state(folder / "waiting", turn, {"weights": collected(weights, whole(True, on_cpu))}, 1)
    return clock() - begin


def _background(
    folder: Path, turn: int, weights: list[Tensor], writer: StateWriter, step: float
) -> dict[str, float]:
    """Seconds of all that training loses, and until the state is there.

    It loses what it takes to begin, the time from the end of the next backward pass until the weights are
    copied, and, while the state is written, the time of its steps beyond what they take without.
    """
    alone = _steps(AROUND / 2)
    begin = clock()
    copy = collected(weights, whole(True, writer.next(weights)))
    writer.write(folder / "background", turn, {"weights": copy}, 1)
    begun = clock() - begin
    done, seconds = _steps(step)
    gate = clock()
    writer.copied()
    copied = clock() - gate
    while writer.busy:
        more = _steps(0.05)
        done, seconds = done + more[0], seconds + more[1]
    writer.wait()
    written = clock() - begin
    behind = _steps(AROUND / 2)
    each = (alone[1] + behind[1]) / (alone[0] + behind[0])
    lost = {"begun": begun, "copied": copied, "slower": max(0.0, seconds - done * each)}
    return {**lost, "stall": sum(lost.values()), "written": written}


def _steps(seconds: float) -> tuple[int, float]:
    """Steps that need the interpreter as a training loop does, for so long: how many, and their seconds."""
    a, number = torch.ones(64, 64), 0
    begin = clock()
    while clock() - begin < seconds:
        for _ in range(100):
            torch.matmul(a, a)
        number += 100
    return number, clock() - begin


def table(measured: dict[str, Any]) -> str:
    """The figures for people."""
    return "\n".join(
        [
            f"a state of {measured['megabytes']} MB",
            f"written while training waits    {measured['waiting_s']:8.2f} s",
            f"written in the background       {measured['written_s']:8.2f} s, of which training loses"
            f" {measured['stall_s']:.3f} s:",
            f"  to begin                      {measured['begun_s']:8.3f} s",
            f"  for the copy                  {measured['copied_s']:8.3f} s, behind {measured['step_s']:g} s"
            " of forward and backward passes",
            f"  in steps that are slower      {measured['slower_s']:8.3f} s",
            f"training loses of what it would wait: {100 * measured['ratio']:.1f} %"
            f" (pairs: {', '.join(f'{100 * ratio:.1f}' for ratio in measured['ratios'])})",
        ]
    )


def draw_stalls(measured: dict[str, Any], path: Path) -> None:
    """Bars of the seconds that training loses."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.8), layout="constrained")
    axes = figure.subplots()
    names, seconds = ("waiting", "in the background"), (measured["waiting_s"], measured["stall_s"])
    axes.barh(names, seconds, color=["tab:gray", "tab:blue"])
    axes.set_xlabel(f"seconds that training loses by a state of {measured['megabytes']} MB")
    figure.savefig(path, dpi=120)
