"""``bdm index``: who scans which shards of a corpus, and what came out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from ..config import IndexConfig, ParquetConfig, ShardsConfig
from ..data.index_report import describe, draw_histograms
from ..data.indexing import TOGETHER, Maker
from ..errors import UserError
from ..parallel.processes import cpu_only
from ..parallel.ray import run_on_ray
from ..training.recipes.build import build_corpus

Engine = Literal["accelerate", "ray"]


class IndexWorker:
    """Scans shards in a process of a cluster."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    def run(self, task: int) -> int:
        """Scan the files of a task; returns how many they were."""
        return self.maker.run(task)


def index_corpora(config: IndexConfig, engine: Engine = "accelerate") -> Iterator[str]:
    """Make the indices that a configuration's data name; gives what came out of each, in the main process.

    Raises:
        UserError: they name none, or see ``Maker``.
    """
    for data in _indexed(config.data):
        assert data.index is not None
        maker = Maker(build_corpus(data), data.index.resolve(), data.shard_limit, config.unreadable_limit)
        if engine == "ray":
            maker.begin()
            tasks = maker.tasks()
            run_on_ray(IndexWorker, (maker,), tasks, len(tasks) * TOGETHER, "indexing")
        elif not _share_out(maker):
            continue
        index, changes = maker.finish()
        draw_histograms(index, data.index / "histogram.png")
        yield describe(index, changes)


def _indexed(data: Any) -> list[ShardsConfig | ParquetConfig]:
    """The data that have an index."""
    parts = [part.data for part in getattr(data, "parts", ())] or [data]
    found = [part for part in parts if getattr(part, "index", None) is not None]
    if not found:
        raise UserError(
            "the configuration names no index; give data.index=FOLDER, where all processes can read it (for"
            " kind: shards or parquet)"
        )
    return found


def _share_out(maker: Maker) -> bool:
    """Scan what is missing, shared by the processes of ``accelerate launch``; True in the main one."""
    # Processes that are done wait for the others, and shards differ.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=cpu_only(), kwargs_handlers=[patience])
    first = accelerator.is_main_process
    if first:
        maker.begin()
    accelerator.wait_for_everyone()
    tasks = maker.tasks()
    accelerator.wait_for_everyone()
    own = tasks[accelerator.process_index :: accelerator.num_processes]
    for task in tqdm(own, desc=f"indexing, {TOGETHER} files a step", mininterval=2, disable=not first):
        maker.run(task)
    accelerator.wait_for_everyone()
    return first
