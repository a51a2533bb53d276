"""A request on its way through an engine, as whoever gave it sees it."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

from PIL import Image

from ..drawing.painter import Drawn
from ..drawing.request import Request
from ..errors import UserError

logger = logging.getLogger("bdm")

Status = Literal["queued", "running", "done", "failed", "cancelled"]
#: From which a job does not change any more.
ENDS: tuple[Status, ...] = ("done", "failed", "cancelled")


class QueueFull(UserError):
    """As many requests are waiting as the engine takes."""


class Cancelled(UserError):
    """The picture was cancelled, so there is none."""


class Job:
    """A picture on its way. All methods may be called in any thread.

    Attributes:
        id: its own, of 32 hexadecimal digits.
        request: complete.
        status: "queued", "running", "done", "failed" or "cancelled".
        step: steps that are done.
        steps: of them all, as far as they are known.
        alone: why it cannot be joined with others, so that it is drawn alone; "" where it can.
    """

    def __init__(
        self, request: Request, alone: str = "", on_cancel: Callable[[], Any] = lambda: None
    ) -> None:
        self.id, self.request, self.alone = uuid.uuid4().hex, request, alone
        self._on_cancel = on_cancel
        self.status: Status = "queued"
        self.step, self.steps = 0, request.steps
        self.is_cancelled = False
        self._changed = threading.Condition()
        self._drawn: Drawn | None = None
        self._error: UserError | None = None
        self._look: Callable[[], Image.Image] | None = None
        self._callbacks: list[Callable[[Job], None]] = []

    def preview(self) -> Image.Image | None:
        """What the picture looks like after the newest step, roughly; itself at the end, None before."""
        with self._changed:
            drawn, look = self._drawn, self._look
        return drawn.image if drawn is not None else None if look is None else look()

    def cancel(self) -> None:
        """Stop it: at once where it waits, with the step that is being computed where it is drawn.

        One that has ended stays as it is.
        """
        self.is_cancelled = True
        if self.status == "queued":
            self.end("cancelled")
        self._on_cancel()

    def result(self, timeout: float | None = None) -> Drawn:
        """Wait for the picture.

        Args:
            timeout: seconds; None waits to the end.

        Raises:
            UserError: it could not be drawn.
            Cancelled: somebody cancelled it.
            TimeoutError: it is not there yet.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.status in ENDS, timeout):
                raise TimeoutError(f"the picture is not drawn after {timeout:g} s")
            if self._drawn is not None:
                return self._drawn
        if self._error is not None:
            raise self._error
        raise Cancelled("the picture was cancelled; ask for it again")

    def events(self) -> Iterator[tuple[int, int]]:
        """(step, steps) each time that there is something new; ends with the job."""
        seen: tuple[int, int] | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self.status in ENDS or self._progress() != seen)
                ended, now = self.status in ENDS, self._progress()
            if now is not None and now != seen:
                yield now
            if ended:
                return
            seen = now

    def add_done_callback(self, function: Callable[[Job], None]) -> None:
        """Call a function with the job when it has ended, in the engine's thread; at once where it has."""
        with self._changed:
            if self.status not in ENDS:
                self._callbacks.append(function)
                return
        function(self)

    def start(self) -> bool:
        """It is its turn; False where it was cancelled before."""
        with self._changed:
            if self.status == "queued":
                self.status = "running"
            self._changed.notify_all()
            return self.status == "running"

    def advance(self, step: int, steps: int, look: Callable[[], Image.Image] | None = None) -> None:
        """A step is done.

        Args:
            step: its number from 1.
            steps: of them all.
            look: shows what has become of the picture.
        """
        with self._changed:
            self.step, self.steps, self._look = step, steps, look
            self._changed.notify_all()

    def end(self, status: Status, drawn: Drawn | None = None, error: UserError | None = None) -> None:
        """It has ended; what comes later changes nothing."""
        with self._changed:
            if self.status in ENDS:
                return
            self.status, self._drawn, self._error, self._look = status, drawn, error, None
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for function in callbacks:
            try:
                function(self)
            except Exception:  # of whoever gave it; the engine goes on
                logger.exception("a callback of job %s failed", self.id)

    def _progress(self) -> tuple[int, int] | None:
        return (self.step, self.steps) if self.step else None
