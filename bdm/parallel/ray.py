"""Work on a Ray cluster: actors hold the models, Ray schedules the tasks, restarts what dies and scales."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ..errors import UserError, first_line, printable
from ..extras import import_extra


class Worker(Protocol):
    """What a process does for tasks of its kind; it is built once in each actor and holds what they share.

    One whose tasks may fail in part has ``take_failures()``, which gives what could not be done since it was
    asked last.
    """

    def run(self, task: Any) -> int:
        """Do a task; returns how many pictures it had."""
        ...


class _Actor:
    """A worker in a process of the cluster."""

    def __init__(self, kind: Any, arguments: tuple[Any, ...], threads: int, folder: Path) -> None:
        # Paths are relative to where the command was given.
        if folder.is_dir():
            os.chdir(folder)
        # Ray gives its workers one thread; sums in another order would round otherwise than elsewhere.
        torch.set_num_threads(threads)
        self.worker: Worker = kind(*arguments)

    def run(self, task: Any) -> tuple[int, list[Any]] | str:
        """Pictures dealt with and what could not be done, or what is wrong.

        A mistake the user can mend is no reason to try again.
        """
        try:
            done = self.worker.run(task)
            return done, getattr(self.worker, "take_failures", list)()
        except UserError as error:
            return str(error)


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray, with the running cluster (``RAY_ADDRESS``) or a local one, which ends with the block.

    Raises:
        UserError: ray is not installed, does not start, or its cluster is not there.
    """
    ray = import_extra("--engine ray")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    started = not ray.is_initialized()
    if started:
        _start(ray, {"env_vars": {"PYTHONPATH": path}})
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, environment: dict[str, Any]) -> None:
    try:
        ray.init(runtime_env=environment, include_dashboard=False, log_to_driver=False)
    except Exception as error:  # Ray raises all kinds
        where = os.environ.get("RAY_ADDRESS")
        what = f"the cluster at RAY_ADDRESS {printable(where)}" if where else "a cluster on this machine"
        raise UserError(
            f"--engine ray: {what} cannot be used ({first_line(error, 300)}); start one with ray start and"
            " give its address in RAY_ADDRESS, or leave that out"
        ) from None


def run_on_ray(
    kind: Any, arguments: tuple[Any, ...], tasks: Sequence[Any], pictures: int, what: str
) -> list[Any]:
    """Share tasks out to the workers of the running cluster (``RAY_ADDRESS``), or of a local one.

    Each actor takes a GPU where the cluster has some, else one CPU; files must be reachable from all.

    Args:
        kind: class of the worker.
        arguments: what it is built with.
        tasks: what the workers do, in any order.
        pictures: of all tasks together, for the progress bar.
        what: the bar's description.

    Returns:
        What could not be done, of all workers together.

    Raises:
        UserError: ray is not installed, or a task failed for a reason that the user can mend.
    """
    if not tasks:
        import_extra("--engine ray")
        return []
    with cluster() as ray:
        return _run(ray, kind, arguments, tasks, pictures, what)


def _run(
    ray: Any, kind: Any, arguments: tuple[Any, ...], tasks: Sequence[Any], pictures: int, what: str
) -> list[Any]:
    failures: list[Any] = []
    resources = ray.cluster_resources()
    graphics = int(resources.get("GPU", 0))
    count = min(len(tasks), graphics or max(1, int(resources.get("CPU", 1))))
    actor = ray.remote(num_cpus=1, num_gpus=1 if graphics else 0, max_restarts=3, max_task_retries=3)(_Actor)
    workers = [actor.remote(kind, arguments, torch.get_num_threads(), Path.cwd()) for _ in range(count)]
    with tqdm(total=pictures, desc=f"{what} ({count} workers)", unit="picture", mininterval=2) as bar:
        waiting = [*tasks][::-1]
        busy = {worker.run.remote(waiting.pop()): worker for worker in workers}
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, result = busy.pop(done), ray.get(done)
            if isinstance(result, str):
                raise UserError(result)
            bar.update(result[0])
            failures += result[1]
            if waiting:
                busy[worker.run.remote(waiting.pop())] = worker
    return failures
