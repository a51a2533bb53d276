"""An engine that draws nothing: its pictures are of one colour, and each of its steps takes a given time."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace

from PIL import Image

from bdm.drawing.complete import complete
from bdm.drawing.painter import Drawn
from bdm.errors import UserError
from bdm.serving.job import QueueFull


class FakeJob:
    def __init__(self, number, request):
        self.id, self.request, self.alone = str(number), request, ""
        self.status, self.step, self.steps = "queued", 0, request.steps
        self.picture, self.error = None, None
        self.functions, self.over = [], threading.Event()

    def preview(self):
        return Image.new("RGB", (8, 8), (min(self.step, 255), 0, 0)) if self.step else None

    def cancel(self):
        if not self.over.is_set():
            self.end("cancelled")

    def result(self, timeout=None):
        if not self.over.wait(timeout):
            raise TimeoutError
        if self.error is not None:
            raise self.error
        if self.picture is None:
            raise CancelledError
        return self.picture

    def add_done_callback(self, function):
        if self.over.is_set():
            function(self)
        else:
            self.functions.append(function)

    def end(self, status):
        self.status = status
        self.over.set()
        for function in self.functions:
            function(self)


class FakeEngine:
    """Draws one after the other, each step in ``seconds``; a prompt "fails" or "breaks" where it says so."""

    def __init__(self, library, seconds=0.0, queue_limit=256):
        self.library, self.seconds, self.limit = library, seconds, queue_limit
        self.waiting, self.count, self.open = [], 0, True
        self.more = threading.Condition()
        self.seen = []
        self.gate = threading.Event()
        self.hold_at = 0  # a step behind which a drawing waits to be cancelled
        self.gate.set()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, request):
        whole = complete(request, self.library)
        with self.more:
            if len(self.waiting) >= self.limit:
                raise QueueFull("too many wait")
            self.count += 1
            job = FakeJob(self.count, whole)
            self.waiting.append(job)
            self.more.notify()
        return job

    def close(self, wait=True):
        with self.more:
            self.open = False
            self.more.notify()
        self.thread.join()
        return self.waiting

    def stats(self):
        return {"steps": 1.0, "waiting": float(len(self.waiting))}

    def _work(self):
        while True:
            with self.more:
                while not self.waiting and self.open:
                    self.more.wait()
                if not self.waiting:
                    return
                job = self.waiting.pop(0)
            if not job.over.is_set():
                self._draw(job)

    def _draw(self, job):
        self.seen.append(job)
        job.status = "running"
        self.gate.wait(60)
        wait = threading.Event()
        for step in range(job.steps if self.seconds else 1):
            if job.over.is_set():
                return
            if self.seconds:
                wait.wait(self.seconds)
            job.step = step + 1
            while job.step == self.hold_at and not job.over.is_set():
                wait.wait(0.02)
        if job.over.is_set():
            return
        if "fails" in job.request.prompt_en:
            job.error = UserError("the picture came out as NaN")
        elif "breaks" in job.request.prompt_en:
            job.error = RuntimeError("a library broke")
        else:
            size = (job.request.width or 32, job.request.height or 32)
            image = Image.new("RGB", size, (job.request.seed % 256, 0, 0))
            job.picture = Drawn(image, replace(job.request), ("Euler", ""))
        job.end("failed" if job.error else "done")
