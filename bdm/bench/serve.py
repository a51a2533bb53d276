"""Requests at once: an engine that joins their steps beside the same one that draws one after the other."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import BenchServeConfig
from ..drawing.request import FileRef, Request
from ..errors import UserError
from ..extras import require_packages
from ..serving.engine import Engine

PROMPTS = ("红灯笼", "月饼", "龙", "饺子", "红包", "老虎", "苹果", "太阳")
#: The sides, in the order of their names below.
SIDES = ("one by one", "joined")
#: How far pixels of 0 to 255 may lie apart that were rounded from sums in another order.
_ROUNDED = 1


@dataclass(frozen=True)
class Run:
    """Requests that were given at once.

    Attributes:
        seconds: until each picture was there, in order.
        processor: seconds of the CPU that all of them took.
        pictures: as bytes.
    """

    seconds: list[float]
    processor: float
    pictures: list[Any]

    @property
    def whole(self) -> float:
        """Seconds until the last picture."""
        return max(self.seconds)

    @property
    def p95(self) -> float:
        """Seconds within which 95 of 100 pictures are there."""
        return float(np.quantile(self.seconds, 0.95))


def measure(config: BenchServeConfig) -> dict[str, Any]:
    """Draw on both sides in turn, one request and then all at once.

    Raises:
        UserError: the sides' pictures differ, or packages of a server are missing.
    """
    require_packages("bdm serve")
    from .second import second_picture

    engines = {
        "one by one": Engine(device=config.device, joining=False),
        "joined": Engine(device=config.device, max_batch=config.max_batch or config.requests),
    }
    try:
        return _figures(config, engines) | {"second_picture": second_picture(config, engines["joined"])}
    finally:
        for engine in engines.values():
            engine.close()


def _figures(config: BenchServeConfig, engines: dict[str, Engine]) -> dict[str, Any]:
    model = None if config.model is None else FileRef.to(config.model)
    requests = [
        Request(prompt=PROMPTS[i % len(PROMPTS)], seed=config.seed + i, steps=config.steps, model=model)
        for i in range(config.requests)
    ]
    for engine in engines.values():
        run(engine, requests[:1])
    single: list[Run] = []
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for pair in range(config.pairs):
        single.append(run(engines["one by one"], requests[:1]))
        for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
            runs[side].append(run(engines[side], requests))
        _check(runs)
        print(
            f"pair {pair + 1} of {config.pairs}: joined / one by one {_ratio(runs, pair, 'whole'):.3f},"
            f" of the processor's time {_ratio(runs, pair, 'processor'):.3f}",
            flush=True,
        )
    return summary(single, runs, engines["joined"])


def run(engine: Engine, requests: list[Request]) -> Run:
    """Give requests at once, and wait for all."""
    seconds: dict[str, float] = {}
    done = threading.Semaphore(0)
    start, processor = time.perf_counter(), time.process_time()

    def note(job: Any) -> None:
        seconds[job.id] = time.perf_counter() - start
        done.release()

    jobs = [engine.submit(request) for request in requests]
    for job in jobs:
        job.add_done_callback(note)
    for _ in jobs:
        done.acquire()
    spent = time.process_time() - processor
    pictures = [np.asarray(job.result().image).astype(int) for job in jobs]
    return Run([seconds[job.id] for job in jobs], spent, pictures)


def _check(runs: dict[str, list[Run]]) -> None:
    one, joined = (runs[side][-1].pictures for side in SIDES)
    most = max(int(abs(a - b).max()) for a, b in zip(one, joined, strict=True))
    if most > _ROUNDED:
        raise UserError(f"joined pictures differ from those drawn alone by {most} of 255; nothing is timed")


def _ratio(runs: dict[str, list[Run]], pair: int, what: str) -> float:
    return getattr(runs["joined"][pair], what) / getattr(runs["one by one"][pair], what)


def summary(single: list[Run], runs: dict[str, list[Run]], engine: Engine) -> dict[str, Any]:
    """The figures of the JSON line; medians of the pairs."""
    pairs = range(len(single))
    alone = statistics.median(one.whole for one in single)
    return {
        "ratio": _median(_ratio(runs, i, "whole") for i in pairs),
        "processor_ratio": _median(_ratio(runs, i, "processor") for i in pairs),
        "p95_over_alone": {side: _median(one.p95 / alone for one in runs[side]) for side in SIDES},
        "least_p95_over_alone": round(least_p95(runs["joined"]) / alone, 4),
        "mean_over_alone": {
            side: _median(statistics.mean(one.seconds) / alone for one in runs[side]) for side in SIDES
        },
        "seconds": {"alone": round(alone, 4)}
        | {side: _median(one.whole for one in runs[side]) for side in SIDES},
        "processor_seconds": {"alone": _median(one.processor for one in single)}
        | {side: _median(one.processor for one in runs[side]) for side in SIDES},
        "finished": {side: [round(one, 4) for one in sorted(runs[side][-1].seconds)] for side in SIDES},
        "batch_mean": round(engine.stats()["batch_mean"], 2),
        "threads": torch.get_num_threads(),
    }


def least_p95(joined: list[Run]) -> float:
    """What no order of the requests can be under, as long as no other number of them at once is cheaper.

    When 95 of 100 pictures are there, so much of the work of all must have been done.
    """
    count = len(joined[0].seconds)
    there = int(0.95 * (count - 1)) + 1
    return there / count * statistics.median(run.whole for run in joined)


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)


def table(figures: dict[str, Any]) -> str:
    """A line a side: seconds until all pictures are there, the processor's, and the 95th of 100 requests."""
    lines = [f"{'side':<12} {'seconds':>9} {'processor':>10} {'p95 / alone':>12}"]
    for side in ("alone", *SIDES):
        late = figures["p95_over_alone"].get(side, 1.0)
        seconds, processor = figures["seconds"][side], figures["processor_seconds"][side]
        lines.append(f"{side:<12} {seconds:>9.3f} {processor:>10.3f} {late:>12.2f}")
    lines.append(f"joined / one by one: {figures['ratio']:.3f}")
    lines.append(f"least p95 / alone in any order: {figures['least_p95_over_alone']:.2f}")
    second = figures["second_picture"]
    told = f"{second['seconds']:.3f} s, {second['beyond']:.3f} of them beyond its steps"
    return "\n".join([*lines, f"second picture of a server: {told}"])


def draw_finished(figures: dict[str, Any], path: Path) -> None:
    """Pictures that are there over the seconds, a curve a side."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for side, seconds in figures["finished"].items():
        axes.step([0.0, *seconds], range(len(seconds) + 1), where="post", label=side)
    axes.set_xlabel("seconds")
    axes.set_ylabel("pictures that are there")
    axes.legend()
    figure.savefig(path, dpi=120)
