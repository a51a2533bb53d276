"""A comparison: sides that must agree before they are timed in turn."""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..config import BenchConfig
from ..errors import UserError
from ..plan.operations import CountedOperations, miscounted_on

logger = logging.getLogger("bdm")

OURS = "bdm"


@dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to run.

    Attributes:
        seconds: does the work once and says how long that took.
        result: what the sides must agree on.
        flops: floating-point operations of one run, two per multiply-add; None if they are not counted.
    """

    seconds: Callable[[], float]
    result: Callable[[], Tensor]
    flops: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a comparison found.

    Attributes:
        seconds: of every run, by side; run i of all sides belongs together.
        flops: of one run, by side.
        memory: peak bytes of one run in a process of its own, by side.
        error: largest difference of a side's result from the first peer's, relative to its largest value.
        rate: best measured convolution rate of the machine, FLOP/s; 0 if no operations were counted.
    """

    seconds: dict[str, list[float]]
    flops: dict[str, int | None]
    memory: dict[str, int]
    error: float
    rate: float

    def ratios(self, peer: str) -> list[float]:
        """Peer's time over ours, pair by pair."""
        return [theirs / ours for theirs, ours in zip(self.seconds[peer], self.seconds[OURS], strict=True)]


class Bench(ABC):
    """A kind of work and its sides; a side is built by ``side`` when it is needed."""

    #: The sides we are compared with; the first is the one whose ratio counts.
    peers: tuple[str, ...]
    #: Its settings; a subclass has a class of its own for them.
    config: Any

    @abstractmethod
    def side(self, name: str, count: bool = True) -> Side:
        """Build a side: a peer by its name, or ``OURS``.

        ``count`` counts its operations, which takes a run.
        """

    def memory(self, name: str) -> int:
        """Peak bytes of a side, in a process of its own."""
        return run_apart("bdm.bench.subprocess_main", name, self.config.model_dump_json())["peak"]


def compare(bench: Bench, config: BenchConfig, say: Callable[[str], None] = print) -> Outcome:
    """Check that the sides agree, then time them in turn.

    Raises:
        UserError: the results differ by more than ``config.tolerance``; nothing is timed then.
    """
    names = (*bench.peers, OURS)
    memory = {name: bench.memory(name) for name in names}
    sides = {name: bench.side(name) for name in names}
    error = disagreement(sides, config.tolerance)
    say(f"results agree: max relative error {error:.1e}")
    for _ in range(config.warm_up):
        for side in sides.values():
            side.seconds()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair, runs in enumerate(take_turns(sides, config.pairs), 1):
        for name, run in runs.items():
            seconds[name].append(run)
        say(
            f"pair {pair} of {config.pairs}: "
            + ", ".join(f"{peer} / {OURS} {runs[peer] / runs[OURS]:.3f}" for peer in bench.peers)
        )
    flops = {name: side.flops for name, side in sides.items()}
    return Outcome(seconds, flops, memory, error, convolution_rate(config) if any(flops.values()) else 0.0)


def take_turns(sides: Mapping[str, Side], pairs: int) -> Iterator[dict[str, float]]:
    """Seconds of every side, round by round.

    Who begins alternates, so that a machine that slows down favours nobody.
    """
    names = list(sides)
    for pair in range(pairs):
        yield {name: sides[name].seconds() for name in (names if pair % 2 == 0 else names[::-1])}


def disagreement(sides: Mapping[str, Side], tolerance: float) -> float:
    """Largest difference of a side's result from the first one's, relative to its largest value.

    Raises:
        UserError: it is above ``tolerance``.
    """
    reference, *others = (side.result().double() for side in sides.values())
    largest = 0.0
    for name, result in zip(list(sides)[1:], others, strict=True):
        error = relative_error(result, reference)
        if not error <= tolerance:
            sides_named = f"{name} and {next(iter(sides))}"
            raise UserError(
                f"{sides_named} differ by {error:.1e} relative, allowed is tolerance={tolerance:g}; nothing"
                " was timed"
            )
        largest = max(largest, error)
    return largest


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``reference``."""
    return ((result - reference).abs().max() / reference.abs().max()).item()


def stopwatch(run: Callable[[], Any]) -> float:
    """Seconds that ``run`` takes, until the accelerator has finished too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_flops(run: Callable[[], Any]) -> int | None:
    """Floating-point operations of matrix products, convolutions and attentions, two per multiply-add.

    Of packed layers too. None, and a warning, where this PyTorch has operators for them that are not known.
    """
    with CountedOperations() as counter:
        run()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    uncounted = {name for device in devices for name in miscounted_on(device)} | counter.operations.uncounted
    if uncounted:
        logger.warning("operations are not counted: PyTorch %s has %s", torch.__version__, sorted(uncounted))
        return None
    return counter.total


@torch.no_grad()
def convolution_rate(
    config: BenchConfig, shapes: Sequence[tuple[int, int]] = ((320, 64), (640, 32), (256, 64)), runs: int = 5
) -> float:
    """The machine's best rate on 3x3 convolutions of SD1.5's sizes, (channels, side), in FLOP/s."""
    best = 0.0
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    for channels, side in shapes:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, channels, side, side, dtype=dtype, device=device).to(memory_format=layout)
            weight = torch.randn(channels, channels, 3, 3, dtype=dtype, device=device).to(
                memory_format=layout
            )
            seconds = min(
                stopwatch(lambda x=x, weight=weight: conv2d(x, weight, padding=1)) for _ in range(runs)
            )
            best = max(best, 2 * 2 * side**2 * 9 * channels**2 / seconds)
    return best


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def run_apart(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module`` and read the JSON object that is its last line.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-1:] or [
            f"exit status {done.returncode}, perhaps out of memory"
        ]
        raise UserError(f"a measurement in its own process failed: {tail[0]}")
    return json.loads(done.stdout.splitlines()[-1])
