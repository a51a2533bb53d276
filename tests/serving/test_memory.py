"""A server that has drawn for long takes no more memory than one that has drawn a little.

``BDM_REQUESTS`` says how many requests the slow test makes.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from bdm.drawing.library import DEFAULT_MODEL

REQUESTS = int(os.environ.get("BDM_REQUESTS", "1000"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="assets/emoji is missing"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no process's memory"),
]
SERVER = """
import sys
from pathlib import Path
from bdm.serving.app import Settings, build
from bdm.serving.engine import Engine
from bdm.serving.server import listening, run
bound = listening("127.0.0.1", 0)
served = build(Settings(history=Path(sys.argv[1])), lambda library: Engine(models=library, device="cpu"))
run(served, bound, lambda: print(bound.getsockname()[1], flush=True))
"""
SAMPLERS = ["", "Euler a", "DPM++ 2M", "DDIM", "UniPC"]


def resident(process):
    """MiB of a process that are in memory."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def ask(address, numbers, wrong):
    """Draw as one client does, a few steps of this and that."""
    with httpx.Client(base_url=address, timeout=600) as client:
        for number in numbers:
            said = {"prompt": f"红灯笼{number}", "seed": number, "width": 32, "height": 32}
            said |= {
                "steps": 1 + number % 3,
                "cfg_scale": 1 + number % 2,
                "sampler_name": SAMPLERS[number % 5],
            }
            answer = client.post("/sdapi/v1/txt2img", json=said)
            if answer.status_code != 200:
                wrong.append(answer.text)


def by_five_clients(address, numbers):
    wrong = []
    shares = [numbers[i::5] for i in range(5)]
    threads = [threading.Thread(target=ask, args=(address, share, wrong)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_memory_stays_what_it_was(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        warm = max(100, REQUESTS // 5)
        by_five_clients(address, range(warm))
        before = resident(process)
        by_five_clients(address, range(warm, warm + REQUESTS))
        after = resident(process)
        print(f"{before:.1f} MiB before {REQUESTS} requests, {after:.1f} after")
        assert after <= 1.02 * before
    finally:
        process.terminate()
        process.stdout.close()
        assert process.wait(120) == 0
