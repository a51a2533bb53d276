"""What a large corpus costs: the start of a process, its memory, order and resume, and what a pass reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BenchDataConfig
from ..data.batch import stream
from ..data.index import FORMAT, SAMPLE, SHARD
from ..data.indexed import IndexedSource
from ..data.indexing import Corpus, Maker
from ..data.node import Node
from ..data.pictures import PictureRules
from ..extras import require_packages
from ..files import write_json
from . import slow_store

#: Samples and shards of the corpus that the growth is carried on to.
FAR = (1_200_000_000, 120_000)
#: Batches whose order is timed.
BATCHES = 50

_PROCESS = """
import json, sys, time
import torch, numpy
from bdm.bench.data import cost_of_process
print(json.dumps(cost_of_process(*json.loads(sys.argv[1]))))
"""


def measure(config: BenchDataConfig) -> dict[str, Any]:
    """All figures of a configuration."""
    with tempfile.TemporaryDirectory(prefix="bdm-bench-data-") as name:
        folder = Path(name)
        rows = [_grown(config, folder / str(samples), samples) for samples in config.samples]
        return {"growth": rows, "far": _far(rows), "reading": measure_reading(config, folder)}


def _grown(config: BenchDataConfig, folder: Path, samples: int) -> dict[str, float]:
    """What an index of so many samples costs a process of its own."""
    write_empty_index(folder, samples, config.per_shard)
    given = [str(folder), config.batch, config.processes, config.partitions]
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, json.dumps(given)], capture_output=True, text=True, check=True
    )
    return {"samples": samples, "shards": -(-samples // config.per_shard), **json.loads(done.stdout)}


def cost_of_process(folder: str, batch: int, processes: int, partitions: int) -> dict[str, float]:
    """Seconds and bytes of a process from the index to its first batch, and of the batches behind it."""
    before, begin = own_memory(), time.perf_counter()
    source = IndexedSource(Path(folder), "shards", "slow://c/*.tar", partitions=partitions)
    share = source.order(batch, 0)
    share(0, 0, processes)
    start = time.perf_counter() - begin
    middle = len(source) // batch // 2
    resumed = source.order(batch, 0)
    begin = time.perf_counter()
    resumed(middle, 1, processes)
    resume = time.perf_counter() - begin
    begin = time.perf_counter()
    for number in range(middle, middle + BATCHES):
        resumed(number, 1, processes)
    order = (time.perf_counter() - begin) / BATCHES
    memory = own_memory() - before
    return {"start_s": start, "resume_s": resume, "order_ms": 1000 * order, "memory_mb": memory / 1e6}


def own_memory() -> int:
    """Bytes of memory that this process shares with nobody and no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    return 0


def write_empty_index(folder: Path, samples: int, per_shard: int) -> None:
    """An index of samples that are nowhere, as sparse files."""
    corpus = Corpus(kind="shards", urls=("slow://c/*.tar",), rules=PictureRules())
    counts = np.full(-(-samples // per_shard) + 1, per_shard)
    counts[-2] -= -samples % per_shard
    shards = np.zeros(len(counts), dtype=SHARD)
    shards["count"], shards["start"], shards["group"] = counts, np.cumsum(counts) - counts, -1
    shards["bytes"] = 50_000 * counts
    inside = folder / "empty"
    inside.mkdir(parents=True)
    np.lib.format.open_memmap(inside / "samples.npy", "w+", SAMPLE, (int(counts.sum()),)).flush()
    np.save(inside / "shards.npy", shards)
    np.save(inside / "names.npy", np.array([f"0/{i:06d}.tar" for i in range(len(counts))], dtype=bytes))
    np.save(inside / "buckets.npy", counts[:, None])
    about = {"format": FORMAT, "fingerprint": "empty", "kind": "shards", "urls": list(corpus.urls)}
    write_json(folder / "index.json", about | {"rules": corpus.decisive, "files": 0, "bad_shards": 0})


def _far(rows: list[dict[str, float]]) -> dict[str, float]:
    """The figures at ``FAR``, if they grow with the shards as they did between the last two sizes."""
    if len(rows) < 2:
        return {}
    before, last = rows[-2:]
    ratio = (FAR[1] - last["shards"]) / max(1, last["shards"] - before["shards"])
    names = ("start_s", "resume_s", "order_ms", "memory_mb")
    far = {name: max(last[name], last[name] + ratio * (last[name] - before[name])) for name in names}
    return {"samples": FAR[0], "shards": FAR[1], **far}


def measure_reading(config: BenchDataConfig, folder: Path) -> dict[str, float]:
    """Bytes of a pass over two machines of two processes, and speed beside the same files on this disk."""
    data = folder / "pictures"
    write_pictures(data, config.shards, config.rows)
    urls = f"slow://{data}/{{00000..{config.shards - 1:05d}}}.tar"
    slow_store.register(config.latency)
    maker = Maker(Corpus(kind="shards", urls=(urls,), rules=_rules()), folder / "index")
    maker.begin()
    for task in maker.tasks():
        maker.run(task)
    maker.finish()
    near = urls.removeprefix("slow://")
    size = sum(path.stat().st_size for path in sorted(data.glob("*.tar"))[:-1])
    slow_store.register(config.latency)
    for process in range(4):
        node = folder / f"node{process // 2}"
        _read(folder, urls, node, process, 4)
    fetched = slow_store.SlowStore.counts["bytes"] / size
    # The best of turns: whatever else the machine does takes time from all.
    seconds: dict[str, float] = {}
    for turn in range(config.pairs):
        ways = {"local": (near, None), "slow": (urls, folder / f"turn{turn}"), "ranges": (urls, None)}
        for name, (where, kept) in ways.items():
            begin = time.perf_counter()
            _read(folder, where, kept, 0, 1)
            seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - begin)
    return {
        "bytes_over_corpus": fetched,
        "speed_over_local": seconds["local"] / seconds["slow"],
        "ranges_over_local": seconds["local"] / seconds["ranges"],
        "samples_per_second": (config.shards - 1) * config.rows / seconds["slow"],
    }


def _rules() -> PictureRules:
    return PictureRules(size=256, captions={"txt": 1.0})


def _read(folder: Path, urls: str, local: Path | None, process: int, processes: int) -> None:
    """Read a process's part of a pass."""
    source = IndexedSource(
        folder / "index", "shards", urls, partitions=8, local=local, size=256, captions={"txt": 1.0}
    )
    size = 16
    node = Node(process // 2 * 2, 2, processes) if processes > 1 else Node()
    for _ in stream(source, 0, len(source) // size, size, 0, process=process, processes=processes, node=node):
        pass


def write_pictures(folder: Path, shards: int, rows: int) -> None:
    """Shards of pictures of about 50 kB."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(rows):
                file = io.BytesIO()
                noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).resize((320, 320)).save(file, "JPEG", quality=95)
                for name, content in ((f"{row:05d}.jpg", file.getvalue()), (f"{row:05d}.txt", b"noise")):
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))


def table(measured: dict[str, Any]) -> str:
    """The figures for people."""
    heads = f"{'samples':>14} {'shards':>9} {'start, s':>9} {'resume, s':>10}"
    lines = [f"{heads} {'order, ms':>10} {'memory, MB':>11}"]
    for row in [*measured["growth"], *([measured["far"]] if measured["far"] else [])]:
        note = " (carried on)" if row is measured["far"] else ""
        lines.append(
            f"{row['samples']:>14,} {row['shards']:>9,} {row['start_s']:>9.3f} {row['resume_s']:>10.3f}"
            f" {row['order_ms']:>10.3f} {row['memory_mb']:>11.1f}{note}"
        )
    reading = measured["reading"]
    lines.append(
        f"a pass over two machines of two processes fetches {reading['bytes_over_corpus']:.3f} of the corpus;"
        f" from the store {reading['speed_over_local']:.2f} of the speed of this disk, by ranges alone"
        f" {reading['ranges_over_local']:.2f}"
    )
    return "\n".join(lines)


def draw_growth(measured: dict[str, Any], path: Path) -> None:
    """The growth as a chart."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = measured["growth"]
    for name in ("start_s", "resume_s", "order_ms", "memory_mb"):
        axes.plot([row["samples"] for row in rows], [row[name] for row in rows], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="samples of the corpus")
    axes.legend()
    figure.savefig(path, dpi=110)
