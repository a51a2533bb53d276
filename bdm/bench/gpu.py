"""Everything that needs a GPU, in one go: the tests marked ``gpu`` and the benches, within a time limit.

Each runs in a process of its own, so that what fails, or runs out of memory, ends none of the rest.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import BenchGpuConfig
from ..errors import UserError
from ..files import write_json

#: Figures of a bench that go into the last line.
KEPT = ("ratio", "seconds", "peak_memory_ratio", "max_relative_error")
#: The bdm command of this very installation.
BDM = (sys.executable, "-c", "from bdm.cli import console; console()")
#: Less than this is not worth beginning with.
SHORTEST = 5.0

#: Runs a command for so many seconds at most: exit status, or None where the time was over, and output.
Run = Callable[[Sequence[str], float], tuple[int | None, str]]


def run_gpu(config: BenchGpuConfig, run: Run | None = None) -> dict[str, Any]:
    """Run all, and print one line of JSON, the last.

    Args:
        config: what is run.
        run: runs a command; in a process if None.

    Raises:
        UserError: there is no such device, or something failed; the line was printed before.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here that this PyTorch can use; give device=cpu for a rehearsal")
    run, start = run or _in_a_process, time.monotonic()
    figures: dict[str, Any] = {"device": _device(config.device), "torch": torch.__version__}

    def left() -> float:
        return config.seconds - (time.monotonic() - start)

    if config.tests is not None:
        figures["tests"] = _tests(config, run, left())
    for name, settings in config.benches.items():
        figures[name] = _bench(config, name, settings, run, left())
    figures["total_seconds"] = round(time.monotonic() - start, 1)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "gpu.json", figures)
    print(json.dumps(figures), flush=True)
    failed = [name for name, found in figures.items() if isinstance(found, Mapping) and "failed" in found]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; {config.out / 'gpu.json'} says why")
    return figures


def _device(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or "cpu"


def _tests(config: BenchGpuConfig, run: Run, seconds: float) -> dict[str, Any]:
    """How many tests of the device passed, failed and were left out."""
    marker = "gpu" if config.device == "cuda" else "not gpu and not slow and not peer"
    # Compilers and drivers warn of what no test is about.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", marker, *(config.tests or ())]
    status, said = run(command, seconds)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", said)
    }
    if status == 0:
        return counts
    return counts | {"failed": counts.get("failed", 0), "why": _why(status, said)}


def _bench(
    config: BenchGpuConfig, name: str, settings: Mapping[str, Any], run: Run, seconds: float
) -> dict[str, Any]:
    """The figures of a bench, or why there are none."""
    if seconds < SHORTEST:
        return {"left_out": "no time was left"}
    with tempfile.TemporaryDirectory(prefix="bdm-gpu-") as folder:
        path = Path(folder) / "bench.yaml"
        own = {**settings, "device": config.device, "out": str(config.out / name)}
        path.write_text(yaml.safe_dump(own), encoding="utf-8")
        status, said = run([*BDM, "bench", own["kind"], str(path)], seconds)
    if status != 0:
        return {"failed": _why(status, said)}
    found = json.loads(said.strip().splitlines()[-1])
    return {key: found[key] for key in KEPT if key in found}


def _why(status: int | None, said: str) -> str:
    if status is None:
        return "the time was over"
    return (said.strip().splitlines() or [f"exit status {status}, perhaps out of memory"])[-1][:300]


def _in_a_process(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return None, said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout
