"""An engine: requests enter, pictures leave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..drawing.complete import complete, default_guidance
from ..drawing.library import Library
from ..drawing.painter import NONE_DRAWN, Painter, choose_device, usual_precision
from ..drawing.request import FileRef, Request
from ..errors import UserError, first_line
from .job import Cancelled, Job, QueueFull


class Engine:
    """Draws requests as they come, in a thread of its own that has the model.

    Args:
        models: folders that files are looked for in, or what lies in them.
        device: by name; None for the best there is.
        max_batch: pictures that are drawn at once; None for as many as fit.
        joining: whether requests share calls of the networks; False draws one after the other.
        pipeline: that draws, where it is loaded already; requests then name no model.
        queue_limit: requests that may wait.

    Example:
        >>> engine = bdm.Engine()
        >>> job = engine.submit(bdm.Request(prompt="红灯笼", seed=7))
        >>> job.result().save("lantern.png")
        >>> engine.close()
    """

    def __init__(
        self,
        *,
        models: Library | Sequence[str | Path] = (),
        device: str | None = None,
        max_batch: int | None = None,
        joining: bool = True,
        pipeline: Any = None,
        queue_limit: int = 256,
    ) -> None:
        self.queue_limit = queue_limit
        self._library = models if isinstance(models, Library) else Library(models)
        self._completing = threading.Lock()
        self._given = None if pipeline is None else FileRef(Path(_name_of(pipeline)).name)
        self._guidance = None if pipeline is None else default_guidance(_name_of(pipeline))
        self._precision = usual_precision(choose_device(device))
        given = None if self._given is None else (self._given, self._precision, pipeline)
        self._painter = Painter(device, given=given)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._counts = {"drawn": 0, "failed": 0, "cancelled": 0}
        self._worker = threading.Thread(target=self._work, name="bdm-engine", daemon=True)
        self._worker.start()

    def submit(self, request: Request) -> Job:
        """Take a request; may be called in any thread.

        Returns:
            The picture on its way.

        Raises:
            UserError: it cannot be drawn, or the engine is closed.
            QueueFull: as many are waiting as ``queue_limit`` says.
        """
        with self._changed:
            self._refuse_more()
        with self._completing:
            job = Job(self._completed(request))
        with self._changed:
            self._refuse_more()
            self._waiting.append(job)
            self._changed.notify_all()
        job.add_done_callback(self._count)
        return job

    def close(self, wait: bool = True) -> list[Job]:
        """Stop; nothing is taken any more.

        Args:
            wait: draw to the end what was taken. Otherwise what is being drawn ends with its step.

        Returns:
            The jobs that were not drawn, which are cancelled; none where it waits.
        """
        with self._changed:
            self._closing = True
            left = [] if wait else [*self._running, *self._waiting]
            self._changed.notify_all()
        for job in left:
            job.cancel()
        self._worker.join()
        return [job for job in left if job.status == "cancelled"]

    def stats(self) -> dict[str, float]:
        """Numbers of jobs: "queued" and "running" now, "drawn", "failed" and "cancelled" since the start."""
        with self._changed:
            queued = sum(job.status == "queued" for job in self._waiting)
            return {"queued": queued, "running": len(self._running), **self._counts, "batch_mean": 1.0}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_more(self) -> None:
        if self._closing:
            raise UserError("the engine is closed and takes nothing more; make another one")
        if sum(job.status == "queued" for job in self._waiting) >= self.queue_limit:
            raise QueueFull(f"{self.queue_limit} requests are waiting, as many as are taken; ask again later")

    def _completed(self, request: Request) -> Request:
        """A request with nothing left open."""
        if self._given is None:
            return complete(request, self._library, self._precision)
        if request.model is not None and request.model != self._given:
            raise UserError(
                f"the engine draws with the pipeline that it was given, and the request names the model"
                f" {request.model.name}; leave model out"
            )
        guidance = self._guidance if request.guidance is None else request.guidance
        found = complete(replace(request, model=None, guidance=guidance), self._library, self._precision)
        return replace(found, model=self._given, precision=self._precision)

    def _count(self, job: Job) -> None:
        with self._changed:
            self._counts["drawn" if job.status == "done" else job.status] += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running.append(job)
            if job.start():
                self._draw_alone(job)
            with self._changed:
                self._running.remove(job)

    def _draw_alone(self, job: Job) -> None:
        def look(step: int, steps: int, latents: Tensor) -> None:
            job.advance(step, steps)
            if job.is_cancelled:
                raise Cancelled("the picture was cancelled")

        try:
            (drawn,) = self._painter.draw([job.request], look)
        except Cancelled:
            job.end("cancelled")
        except Exception as error:  # a request may make any library fail, and ends none of the others
            job.end("failed", error=as_user_error(error))
        else:
            if drawn is None:
                job.end("failed", error=UserError(NONE_DRAWN.format("the picture")))
            else:
                job.end("done", drawn)


def as_user_error(error: Exception) -> UserError:
    """What ended a request, as one who asked for it may read it."""
    if isinstance(error, UserError):
        return error
    return UserError(f"cannot be drawn: {type(error).__name__}: {first_line(error, 300)}")


def _name_of(pipeline: Any) -> str:
    """What a pipeline that was given was loaded from, or its class."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
