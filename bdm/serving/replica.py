"""A process of a cluster that holds an engine and draws what another process sends it."""

from __future__ import annotations

import asyncio
import io
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..drawing.painter import Drawn
from ..drawing.request import Request
from ..errors import UserError
from .engine import Engine
from .job import ENDS, Job, QueueFull, Status
from .names import served_library
from .shipping import Pictures, unpacked
from .uploads import Uploads

#: Seconds between two looks at a job, and between two previews of one.
_LOOK, _PREVIEW = 0.05, 0.5


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica is built with.

    Attributes:
        models: folders that files are looked for in, the same on each machine, or with the same files.
        device: by name; None for the best there is.
        max_batch: see ``Engine``.
        joining: likewise.
        queue_limit: requests that may wait in each replica.
        threads: that it computes with on a CPU; never more than the machine has.
        upload: pixels of a picture that is sent.
    """

    models: tuple[Path, ...] = ()
    device: str | None = None
    max_batch: int | None = None
    joining: bool = True
    queue_limit: int = 256
    threads: int = 1
    upload: int = 2**24


@dataclass(frozen=True)
class Taken:
    """A replica has taken a request, which is complete now.

    Attributes:
        request: the same.
        alone: see ``Job``.
    """

    request: Request
    alone: str = ""


@dataclass(frozen=True)
class Refused:
    """A replica does not take a request.

    Attributes:
        why: for whoever asked.
        full: whether it might later.
    """

    why: str
    full: bool = False


@dataclass(frozen=True)
class Progress:
    """A drawing goes on.

    Attributes:
        step: that is done.
        steps: of them all.
        preview: a PNG; b"" for none that is new.
    """

    step: int
    steps: int
    preview: bytes = b""


@dataclass(frozen=True)
class Ended:
    """A drawing has ended.

    Attributes:
        status: as of a job.
        drawn: the picture, if there is one.
        why: there is none.
        replica: which one drew.
        stats: of its engine.
    """

    status: Status
    drawn: Drawn | None = None
    why: str = ""
    replica: str = ""
    stats: dict[str, float] = field(default_factory=dict)


News = Taken | Refused | Progress | Ended


class Replica:
    """Draws requests with an engine of its own.

    Args:
        settings: of all replicas.
        make_engine: the engine, given the library of the models' folders; None for ``Engine``.
    """

    def __init__(self, settings: ReplicaSettings, make_engine: Any = None) -> None:
        # Ray gives its workers one thread.
        torch.set_num_threads(max(1, min(settings.threads, os.cpu_count() or 1)))
        self._name, self._stack = uuid.uuid4().hex, ExitStack()
        folder = self._stack.enter_context(TemporaryDirectory(prefix="bdm-replica-"))
        self._uploads = Uploads(Path(folder), settings.upload)
        library = served_library(settings.models)
        self._engine = make_engine(library) if make_engine is not None else _engine(settings, library)
        self._stack.callback(self._engine.close, False)

    def close(self) -> None:
        """Cancel what is being drawn, and leave nothing behind."""
        self._stack.close()

    def __del__(self) -> None:  # by which Ray Serve ends a replica
        self.close()

    async def draw(self, request: Request, pictures: Pictures) -> AsyncIterator[News]:
        """Draw a request; whoever leaves before its end cancels it.

        Args:
            request: resolved on another machine.
            pictures: that it needs.
        """
        try:
            job = await asyncio.to_thread(self._submit, request, pictures)
        except UserError as error:
            yield Refused(str(error), isinstance(error, QueueFull))
            return
        try:
            yield Taken(job.request, job.alone)
            async for news in _followed(job):
                yield news
            yield self._end(job)
        finally:
            job.cancel()

    def _submit(self, request: Request, pictures: Pictures) -> Job:
        return self._engine.submit(unpacked(request, pictures, self._uploads))

    def _end(self, job: Job) -> Ended:
        drawn, why = None, ""
        try:
            drawn = job.result(timeout=0) if job.status != "cancelled" else None
        except UserError as error:
            why = str(error)
        return Ended(job.status, drawn, why, self._name, self._engine.stats())


def _engine(settings: ReplicaSettings, library: Any) -> Engine:
    return Engine(
        models=library,
        device=settings.device,
        max_batch=settings.max_batch,
        joining=settings.joining,
        queue_limit=settings.queue_limit,
    )


async def _followed(job: Job) -> AsyncIterator[Progress]:
    """What becomes of a job, until it ends."""
    told, shown = 0, 0.0
    while job.status not in ENDS:
        await asyncio.sleep(_LOOK)
        if job.step == told or job.status in ENDS:
            continue
        told, preview = job.step, b""
        if time.monotonic() - shown > _PREVIEW:
            preview, shown = await asyncio.to_thread(_preview, job), time.monotonic()
        yield Progress(told, job.steps, preview)


def _preview(job: Job) -> bytes:
    written = io.BytesIO()
    with suppress(Exception):  # a preview that cannot be had ends no picture
        picture = job.preview()
        if picture is not None:
            picture.save(written, "png")
    return written.getvalue()
