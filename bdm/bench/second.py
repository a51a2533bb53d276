"""The second picture of a running server: how long its client waits beyond the steps of the drawing."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import BenchServeConfig
from ..serving.app import Settings, build
from ..serving.engine import Engine
from ..serving.server import listening, serve, server


class _Timed:
    """An engine that notes when each step of its newest job was done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.steps: list[float] = []
        self._watch: threading.Thread | None = None

    def submit(self, request: Any) -> Any:
        job = self._engine.submit(request)
        self.steps = []
        self._watch = threading.Thread(target=self._note, args=(job,), daemon=True)
        self._watch.start()
        return job

    def stats(self) -> dict[str, float]:
        return self._engine.stats()

    def close(self, wait: bool = True) -> list[Any]:
        return []  # whoever gave it closes it

    def _note(self, job: Any) -> None:
        self.steps += (time.perf_counter() for _ in job.events())

    def seconds(self) -> float:
        """Of all steps; the first is taken to be as long as the others."""
        assert self._watch is not None
        self._watch.join()
        return (self.steps[-1] - self.steps[0]) * len(self.steps) / max(1, len(self.steps) - 1)


def second_picture(config: BenchServeConfig, engine: Engine) -> dict[str, float]:
    """Ask a server for two pictures, one after the other.

    Returns:
        "seconds" that the second one's client waited, those of its "steps", and what is "beyond" them.
    """
    timed = _Timed(engine)
    with tempfile.TemporaryDirectory() as folder, _running(config, timed, Path(folder)) as address:
        _ask(address, config, config.seed)
        start = time.perf_counter()
        _ask(address, config, config.seed + 1)
        waited = time.perf_counter() - start
    steps = timed.seconds()
    return {"seconds": round(waited, 4), "steps": round(steps, 4), "beyond": round(waited - steps, 4)}


@contextmanager
def _running(config: BenchServeConfig, engine: Any, folder: Path) -> Iterator[str]:
    """Gives the address of a server that draws with an engine."""
    model = None if config.model is None else str(config.model)
    served = build(Settings(history=folder, model=model), lambda library: engine)
    bound, started = listening("127.0.0.1", 0), threading.Event()
    http = server(served)
    thread = threading.Thread(target=lambda: asyncio.run(serve(http, served, bound, started.set)))
    thread.start()
    try:
        started.wait()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join()


def _ask(address: str, config: BenchServeConfig, seed: int) -> None:
    body = {"prompt": "红灯笼", "seed": seed, "steps": config.steps, "width": None, "height": None}
    request = urllib.request.Request(
        f"{address}/sdapi/v1/txt2img", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        answer.read()
