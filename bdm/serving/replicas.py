"""An engine whose pictures are drawn by replicas, each of them an engine in another process.

Whoever serves keeps the queue, the pictures and the journal in its own process; replicas draw and keep
nothing. How requests reach them is handed in (see ``bdm.serving.ray_replicas``).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from ..drawing.request import Request
from ..errors import UserError, first_line
from .job import Cancelled, Job, QueueFull
from .replica import Ended, News, Progress, Refused, Taken
from .shipping import Pictures, packed

#: Seconds in which some replica must take a request, or refuse it.
_PATIENCE = 60.0
#: How often a request is sent anew when its replica has died.
_RETRIES = 3
#: Of a replica's engine: what is summed over all of them.
_SUMMED = ("alone", "steps", "calls")


class Lost(Exception):
    """The replica that was drawing has died."""


class Call:
    """A request at a replica: what is new of it, in order, until it ends.

    Args:
        news: blocks until there is something.
        cancel: has the replica stop; may be called in any thread.
    """

    def __init__(self, news: Iterator[News], cancel: Callable[[], Any]) -> None:
        self.news, self.cancel = news, cancel


#: Sends a request with its pictures to a replica. Its news end with ``Lost`` where that dies.
Send = Callable[[Request, Pictures], Call]


class ReplicaEngine:
    """Takes requests as ``bdm.Engine`` does, and has them drawn by replicas.

    Args:
        send: see above.
        count: of replicas.
        close: ends them.
    """

    def __init__(self, send: Send, count: int, close: Callable[[], Any] = lambda: None) -> None:
        self._send, self._count, self._end_replicas = send, count, close
        self._lock = threading.Lock()
        self._live: dict[Job, threading.Thread] = {}
        self._closing = False
        self._counts = {"drawn": 0, "failed": 0, "cancelled": 0}
        self._told: dict[str, dict[str, float]] = {}

    def submit(self, request: Request) -> Job:
        """Have a replica take a request; may be called in any thread.

        Args:
            request: resolved; its pictures are read now.

        Raises:
            UserError: it cannot be drawn, or the engine is closed.
            QueueFull: too many wait, or no replica answers.
        """
        sent = _Sent(request, self._send)
        thread = threading.Thread(target=self._follow, args=(sent,), name="bdm-replica-call", daemon=True)
        with self._lock:
            if self._closing:
                raise UserError("the engine is closed and takes nothing more; make another one")
            self._live[sent.job] = thread
        thread.start()
        sent.wait(_PATIENCE)
        return sent.job

    def close(self, wait: bool = True) -> list[Job]:
        """Stop; nothing is taken any more, and the replicas end (see ``bdm.Engine.close``)."""
        with self._lock:
            self._closing, live = True, dict(self._live)
        for job in () if wait else live:
            job.cancel()
        for thread in live.values():
            thread.join()
        self._end_replicas()
        return [job for job in live if not wait and job.status == "cancelled"]

    def stats(self) -> dict[str, float]:
        """As of ``bdm.Engine``, of all replicas; what they count of joined steps is as of their last picture.

        "replicas" is how many were asked for.
        """
        with self._lock:
            states = [job.status for job in self._live]
            told, counts = list(self._told.values()), dict(self._counts)
        sums = {name: sum(one.get(name, 0.0) for one in told) for name in _SUMMED}
        mean = sums["steps"] / sums["calls"] if sums["calls"] else 0.0
        now = {"queued": states.count("queued"), "running": states.count("running")}
        return {**now, **counts, **sums, "batch_mean": mean, "replicas": self._count}

    def _follow(self, sent: _Sent) -> None:
        """Bring a job to its end, in a thread of its own."""
        try:
            ended = sent.follow()
        except Exception as error:  # of a library, for any reason
            sent.job.end("failed", error=UserError(f"cannot be drawn: {first_line(error, 300)}"))
            ended = None
        with self._lock:
            del self._live[sent.job]
            if ended is not None and ended.replica:
                self._told[ended.replica] = ended.stats
            if sent.taken:
                self._counts["drawn" if sent.job.status == "done" else sent.job.status] += 1


class _Sent:
    """A request that was sent, and its job.

    Attributes:
        job: the same.
        taken: whether a replica has taken it.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self._request, self._pictures, self._send = request, packed(request), send
        self._call: Call | None = None
        self._answered = threading.Event()
        self._refusal: UserError | None = None
        self._look: Callable[[], Image.Image] | None = None
        self.taken = False
        self.job = Job(request, on_cancel=self._cancel)
        self.job.add_done_callback(lambda _: self._answered.set())

    def wait(self, seconds: float) -> None:
        """Wait until a replica has taken it.

        Raises:
            UserError: it was refused.
            QueueFull: too many wait there, or none answers.
        """
        if not self._answered.wait(seconds):
            self._refusal = QueueFull(f"no replica has answered within {seconds:g} s; ask again later")
            self.job.cancel()
        if self._refusal is not None:
            raise self._refusal
        if not self.taken and self.job.status == "failed":
            self.job.result(timeout=0)

    def follow(self) -> Ended | None:
        """Go along with it; where its replica dies, another begins anew, since the picture is the same."""
        for left in reversed(range(_RETRIES)):
            try:
                return self._follow_once()
            except Lost as error:
                if self.job.is_cancelled:
                    break
                if not left:
                    raise UserError(f"{_RETRIES} replicas have died over this: {error}") from None
            except Cancelled:
                break
        self.job.end("cancelled")
        return None

    def _follow_once(self) -> Ended | None:
        self._call = self._send(self._request, self._pictures)
        if self.job.is_cancelled:  # meanwhile
            self._call.cancel()
        for news in self._call.news:
            match news:
                case Refused():
                    self._refuse(news)
                    return None
                case Taken():
                    self._take(news)
                case Progress():
                    self._go_on(news)
                case Ended():
                    error = UserError(news.why) if news.why else None
                    self.job.end(news.status, news.drawn, error)
                    return news
        raise Lost("it ended without a word")

    def _refuse(self, news: Refused) -> None:
        self._refusal = QueueFull(news.why) if news.full else UserError(news.why)
        self.job.end("failed", error=self._refusal)

    def _take(self, news: Taken) -> None:
        self.job.request, self.job.alone, self.taken = news.request, news.alone, True
        self._answered.set()

    def _go_on(self, news: Progress) -> None:
        self.job.start()
        if news.preview:
            self._look = lambda: Image.open(io.BytesIO(news.preview))
        self.job.advance(news.step, news.steps, self._look)

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
