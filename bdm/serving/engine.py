"""An engine: requests enter a running batch and leave it, each at a step of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..drawing.attached import conditions_of
from ..drawing.complete import complete, default_guidance
from ..drawing.library import Library
from ..drawing.painter import (
    NONE_DRAWN,
    Drawn,
    Painter,
    choose_device,
    draw_images,
    finished,
    usual_precision,
)
from ..drawing.request import FileRef, Request
from ..drawing.samplers import scheduler_names
from ..errors import UserError, first_line
from ..pipeline.onlooker import Look
from .adapters import Differences
from .batch import Batch
from .bound import batch_bound
from .course import Course
from .drawing import own_pipeline
from .job import Cancelled, Job, QueueFull
from .joining import house_of, why_alone
from .preview import Colours, Expected
from .waiting import Queue

#: Pictures at once where nothing else bounds them.
USUAL_BATCH = 16


class Engine:
    """Draws requests as they come, in a thread of its own that has the model.

    Requests that can share calls of the networks do (see ``bdm.serving.joining``): each comes and goes when
    it will, and has its own sampler, steps, guidance, texts and branch. The others are drawn alone.

    Args:
        models: folders that files are looked for in, or what lies in them.
        device: by name; None for the best there is.
        max_batch: pictures that are drawn at once; None for as many as fit into memory, up to
            ``USUAL_BATCH``.
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
        self._device = choose_device(device)
        self._precision = usual_precision(self._device)
        given = None if self._given is None else (self._given, self._precision, pipeline)
        self._painter = Painter(device, given=given, english=pipeline is None)
        self._joining, self._most = joining, max_batch or USUAL_BATCH
        self._bounded = max_batch is None and pipeline is None
        self._colours: dict[Any, Colours] = {}
        self._queue = Queue(patience=2 * self._most)
        self._batch: Batch | None = None
        self._house: tuple[Any, ...] = ()
        self._drawing: dict[Course, Job] = {}
        self._alone: Job | None = None
        #: Taken from the queue, and not yet drawn: its model and plug-ins are being loaded.
        self._entering: Job | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._counts = {"drawn": 0, "failed": 0, "cancelled": 0, "alone": 0, "steps": 0, "calls": 0}
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
            found = self._completed(request)
        job = Job(found, why_alone(found) if self._joining else "the engine joins nothing")
        job.add_done_callback(self._count)
        with self._changed:
            self._refuse_more()
            self._queue.add(job)
            self._changed.notify_all()
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
            left = [] if wait else [*self._running(), *self._queue.jobs()]
            self._changed.notify_all()
        for job in left:
            job.cancel()
        self._worker.join()
        return [job for job in left if job.status == "cancelled"]

    def stats(self) -> dict[str, float]:
        """Numbers: "queued" and "running" jobs now; since the start "drawn", "failed" and "cancelled" ones,
        those drawn "alone", "steps" of drawings that were joined, "calls" of the backbone that they took, and
        "batch_mean", their quotient.
        """
        with self._changed:
            counts = dict(self._counts)
            queued, running = len(self._queue), len(self._running())
        mean = counts["steps"] / counts["calls"] if counts["calls"] else 0.0
        return {"queued": queued, "running": running, **counts, "batch_mean": mean}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> list[Job]:
        taken = (*self._drawing.values(), self._alone, self._entering)
        return list(dict.fromkeys(job for job in taken if job is not None))

    def _refuse_more(self) -> None:
        if self._closing:
            raise UserError("the engine is closed and takes nothing more; make another one")
        if len(self._queue) >= self.queue_limit:
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
        if request.branch is not None:
            raise UserError(
                f"the engine draws with the pipeline that it was given, and the request names the branch"
                f" {request.branch.name}; leave branch out"
            )
        guidance = self._guidance if request.guidance is None else request.guidance
        found = complete(replace(request, model=None, guidance=guidance), self._library, self._precision)
        return replace(found, model=self._given, precision=self._precision)

    def _count(self, job: Job) -> None:
        with self._changed:
            self._counts["drawn" if job.status == "done" else job.status] += 1

    def _work(self) -> None:
        """The worker's life."""
        while self._has_work():
            try:
                self._admit()
                if self._drawing:
                    self._step()
            except Exception as error:  # none of a request's own; who comes next finds a worker all the same
                self._end_all(error)
        self._close_batch()

    def _end_all(self, error: Exception) -> None:
        """Something has ended all that is being drawn."""
        batch = self._batch
        for course in list(self._drawing):
            if batch is not None and course in batch.courses:
                batch.stop(course, error)
            self._leave(course)
        self._close_batch()

    def _has_work(self) -> bool:
        """Wait until there is something to do; False where there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._drawing or self._closing)
            return bool(self._queue or self._drawing)

    def _admit(self) -> None:
        """Let in whoever fits beside those that are being drawn."""
        while len(self._drawing) < self._most:
            with self._changed:
                job = self._entering = self._queue.take(self._fits)
            if job is None:
                return
            try:
                if job.start():
                    self._draw_alone(job) if job.alone else self._enter(job)
            finally:
                with self._changed:
                    self._entering = None

    def _fits(self, job: Job) -> bool:
        return not self._drawing or (not job.alone and self._differences(job.request) is not None)

    def _differences(self, request: Request) -> Differences | None:
        """What a request's adapters differ by from the batch's; None where it cannot be among the batch."""
        batch = self._batch
        if batch is None or house_of(request) != self._house or not batch.controls.has(request):
            return None
        return batch.adapters.differences(request)

    def _enter(self, job: Job) -> None:
        """Let a request into the batch."""
        try:
            batch = self._batch_for(job.request)
            scheduler = self._painter.sampler(job.request)
            look = self._watch(job, self._colours_of(job.request, batch.pipe), Expected(scheduler))
        except Exception as error:  # a request may make any library fail, and ends none of the others
            job.end("failed", error=as_user_error(error))
            return
        differences = batch.adapters.differences(job.request)
        course = Course(lambda course: self._draw(job, batch, scheduler, look, course), differences)
        with self._changed:
            self._drawing[course] = job
        batch.enter(course)
        if course.ended:
            self._leave(course)

    def _batch_for(self, request: Request) -> Batch:
        """A batch with the model and plug-ins of a request."""
        differences = self._differences(request)
        # Where nobody else is drawn, the weights are made its own, which costs nothing in its steps.
        if self._batch is None or differences is None or (differences and not self._drawing):
            self._close_batch()
            pipe = self._painter.pipeline(request)
            self._batch, self._house = Batch(pipe, self._bound_of(request), request), house_of(request)
        return self._batch

    def _bound_of(self, request: Request) -> Callable[[int, int], int]:
        """Gives how many drawings a call may join, by height and width of their latents."""
        if not self._bounded:
            return lambda height, width: self._most
        return lambda height, width: batch_bound(request, (height, width), self._device, self._most)

    def _colours_of(self, request: Request, pipe: Any) -> Colours:
        """How the latents of a request are shown."""
        changed = tuple(plugin for plugin in request.plugins if plugin.kind in ("checkpoint", "vae"))
        key = (request.model, request.precision, changed)
        if key not in self._colours:
            self._colours[key] = Colours.of(pipe.vae)
        return self._colours[key]

    def _close_batch(self) -> None:
        if self._batch is not None:
            self._batch.close()
        self._batch, self._house = None, ()

    def _draw(self, job: Job, batch: Batch, scheduler: Any, look: Look, course: Course) -> Drawn | None:
        """Draw a request as a course."""
        request = job.request
        names = [plugin.name for plugin in request.plugins if plugin.kind == "adapter"]
        hooks = batch.controls.hooks(request, course.ask)
        pipe = own_pipeline(batch.pipe, scheduler, course.ask, names, hooks)
        with batch.adapters.in_texts(course.differences):
            images = draw_images(pipe, [request], conditions_of(request.plugins), look, share=False)
        versions = self._painter.versions(course.together)
        return finished(pipe, images[0], replace(request, versions=versions), scheduler_names(scheduler))

    def _watch(self, job: Job, colours: Colours, expected: Expected | None = None) -> Look:
        """What looks at each step of a job."""

        def look(step: int, steps: int, latents: Tensor) -> None:
            newest = (lambda: latents) if expected is None else expected.newest(latents)
            job.advance(step, steps, lambda: colours.show(newest()))
            if job.is_cancelled:
                raise Cancelled("the picture was cancelled")

        return look

    def _step(self) -> None:
        """One joined call of a network."""
        batch = self._batch
        assert batch is not None
        for course, job in list(self._drawing.items()):
            if job.is_cancelled:
                batch.stop(course, Cancelled("the picture was cancelled"))
                self._leave(course)
        if not self._drawing:
            return
        for course in batch.round():
            self._leave(course)
        with self._changed:
            self._counts["steps"] += batch.last
            self._counts["calls"] += batch.last > 0

    def _leave(self, course: Course) -> None:
        """A course has ended, and so has its job."""
        with self._changed:
            job = self._drawing.pop(course)
        self._end(job, course.error, course.result)

    def _draw_alone(self, job: Job) -> None:
        """Draw as the plain painter does."""
        self._close_batch()
        with self._changed:
            self._alone = job
            self._counts["alone"] += 1
        drawn, error = None, None
        try:
            colours = self._colours_of(job.request, self._painter.pipeline(job.request))
            (drawn,) = self._painter.draw([job.request], self._watch(job, colours))
        except Exception as found:  # likewise
            error = found
        with self._changed:
            self._alone = None
        self._end(job, error, drawn)

    def _end(self, job: Job, error: BaseException | None, drawn: Drawn | None) -> None:
        if isinstance(error, Cancelled):
            job.end("cancelled")
        elif error is not None:
            job.end("failed", error=as_user_error(error))
        elif drawn is None:
            job.end("failed", error=UserError(NONE_DRAWN.format("the picture")))
        else:
            job.end("done", drawn)


def as_user_error(error: BaseException) -> UserError:
    """What ended a request, as one who asked for it may read it."""
    if isinstance(error, UserError):
        return error
    said = first_line(error, 300) if isinstance(error, Exception) else ""
    return UserError(f"cannot be drawn: {type(error).__name__}: {said}")


def _name_of(pipeline: Any) -> str:
    """What a pipeline that was given was loaded from, or its class."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
