"""Preparing on a Ray cluster: actors hold the models, Ray schedules shards, restarts what dies and scales."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import PrepareConfig
from ..errors import UserError
from ..extras import import_extra
from .run import Job, Task


class _Worker:
    """An actor's state: the data and models of one process."""

    def __init__(self, config: PrepareConfig, threads: int, folder: Path) -> None:
        # A configuration's paths are relative to where the command was given.
        if folder.is_dir():
            os.chdir(folder)
        # Ray gives its workers one thread; sums in another order would give other bytes than accelerate's.
        torch.set_num_threads(threads)
        self.job = Job(config, "cuda" if torch.cuda.is_available() else "cpu")

    def run(self, task: Task) -> int | str:
        """Samples dealt with, or what is wrong: a mistake the user can mend is no reason to try again."""
        try:
            self.job.run(task)
        except UserError as error:
            return str(error)
        return len(task.indices)


def run_on_ray(config: PrepareConfig, tasks: list[Task]) -> None:
    """Prepare shards on the workers of the running cluster (``RAY_ADDRESS``), or on a local one.

    Each actor takes a GPU where the cluster has some, else one CPU; ``out`` and the data must be reachable from all.

    Raises:
        UserError: ray is not installed, or a shard cannot be prepared.
    """
    ray = import_extra("--engine ray")
    if not tasks:
        return
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    started = not ray.is_initialized()
    if started:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, include_dashboard=False, log_to_driver=False)
    try:
        _share_out(ray, config, tasks)
    finally:
        if started:
            ray.shutdown()


def _share_out(ray: Any, config: PrepareConfig, tasks: list[Task]) -> None:
    resources = ray.cluster_resources()
    graphics = int(resources.get("GPU", 0))
    count = min(len(tasks), graphics or max(1, int(resources.get("CPU", 1))))
    actor = ray.remote(num_cpus=1, num_gpus=1 if graphics else 0, max_restarts=3, max_task_retries=3)(_Worker)
    config = config.model_copy(update={"out": config.out.resolve()})
    tasks = [Task(task.split, task.indices, task.path.resolve()) for task in tasks]
    workers = [actor.remote(config, torch.get_num_threads(), Path.cwd()) for _ in range(count)]
    bar = tqdm(total=sum(len(task.indices) for task in tasks), desc=f"preparing ({count} workers)", unit="sample", mininterval=2)
    waiting, busy = tasks[::-1], {}
    with bar:
        for worker in workers:
            busy[worker.run.remote(waiting.pop())] = worker
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, result = busy.pop(done), ray.get(done)
            if isinstance(result, str):
                raise UserError(result)
            bar.update(result)
            if waiting:
                busy[worker.run.remote(waiting.pop())] = worker
