"""Replicas on a Ray cluster: Ray Serve starts them, one for each GPU, restarts those that die, and sends each
request to one that has little to do.

Ray's own HTTP proxies stay off. Each of them would put requests to any replica, and what a server knows of
its jobs (progress, previews, cancelling, the journal, the limits of the queue) would be in as many places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch

from ..errors import UserError, first_line
from ..extras import PACKAGES, import_extra
from ..parallel.ray import cluster
from .job import Cancelled
from .replica import News, Replica, ReplicaSettings
from .replicas import Call, Lost, ReplicaEngine, Send
from .shipping import Pictures

_NEED = "bdm serve --engine ray"


def ray_engine(
    settings: ReplicaSettings, count: int | None, name: str, make_engine: Any = None
) -> ReplicaEngine:
    """Start replicas on the running cluster (``RAY_ADDRESS``), or on a local one, which ends with the engine.

    Each has a GPU where the cluster has some, else a share of the CPUs.

    Args:
        settings: of each; ``threads`` is worked out here.
        count: of replicas; None for as many as there are GPUs, or one.
        name: of the application; one of that name, which a killed server left behind, is ended first.
        make_engine: see ``Replica``.

    Raises:
        UserError: ray is not installed, more replicas are asked for than there is place for, or they do not
            start.
    """
    serve = _serve()
    with ExitStack() as stack:
        ray = stack.enter_context(cluster())
        resources = ray.cluster_resources()
        on_cpu = (settings.device or "").startswith("cpu")
        graphics = 0 if on_cpu else int(resources.get("GPU", 0))
        processors = max(1, int(resources.get("CPU", 1)))
        count = _checked(count, graphics, processors)
        threads = torch.get_num_threads() if graphics else max(1, processors // count)
        needs = {"num_cpus": 1, "num_gpus": 1 if graphics else 0}
        serve.start(proxy_location="Disabled")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _end(serve, name)
        stack.callback(_end, serve, name)
        deployment = serve.deployment(
            name="replica",
            num_replicas=count,
            max_ongoing_requests=settings.queue_limit,
            ray_actor_options=needs,
        )(Replica)
        application = deployment.bind(replace(settings, threads=threads), make_engine)
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError as error:
            raise UserError(f"--engine ray: the replicas do not start: {first_line(error, 500)}") from None
        return ReplicaEngine(_sender(ray, handle), count, stack.pop_all().close)


def _serve() -> Any:
    """Ray Serve's module.

    Raises:
        UserError: it is not installed, or not with what it needs.
    """
    try:
        return import_extra(_NEED, "serve")
    except ImportError as error:  # ray alone, without what Serve needs
        raise UserError(
            f"{_NEED} needs Ray Serve ({first_line(error)}); run: pip install {PACKAGES[_NEED][0]}"
        ) from None


def _checked(count: int | None, graphics: int, processors: int) -> int:
    """How many replicas there are to be.

    Raises:
        UserError: as many do not fit.
    """
    most, what = (graphics, "GPUs") if graphics else (processors, "CPUs and no GPU")
    count = (graphics or 1) if count is None else count
    if not 1 <= count <= most:
        raise UserError(f"--replicas {count}: the cluster has {most} {what}; give 1 to {most}")
    return count


def _end(serve: Any, name: str) -> None:
    with suppress(Exception):  # it goes with the cluster, if there is one any more
        if name in serve.status().applications:
            serve.delete(name)


def _sender(ray: Any, handle: Any) -> Send:
    streaming = handle.options(stream=True)

    def send(request: Any, pictures: Pictures) -> Call:
        response = streaming.draw.remote(request, pictures)
        return Call(_news(ray, response), response.cancel)

    return send


def _news(ray: Any, response: Any) -> Iterator[News]:
    """What a replica tells, in the words of ``Call``."""
    wrong, cancelled = ray.exceptions, import_extra(_NEED, "serve.exceptions").RequestCancelledError
    try:
        yield from response
    except (cancelled, wrong.TaskCancelledError):
        raise Cancelled("the picture was cancelled") from None
    except wrong.RayTaskError as error:  # of what the replica computes; elsewhere it would be the same
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, Exception) else error) from None
    except wrong.RayError as error:
        raise Lost(first_line(error, 300)) from None
