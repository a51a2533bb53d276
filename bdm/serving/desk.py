"""Where requests come in and pictures go out: between a server's routes and the engine that draws."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..drawing.chosen import with_chosen
from ..drawing.request import Request
from ..errors import UserError, first_line
from .history import End, History, new_id
from .job import QueueFull
from .limits import Limits
from .metrics import Metrics
from .names import Names

#: Tickets that have ended and are still known by what became of them.
_MOST_ENDED = 1000
#: Seconds between two looks whether a client is still there.
_LOOK = 0.2


class Refused(UserError):
    """A request that a server cannot take now.

    Attributes:
        code: HTTP's status.
        after: seconds after which it may be asked again.
    """

    def __init__(self, message: str, code: int, after: int) -> None:
        super().__init__(message)
        self.code, self.after = code, after


class ClientLeft(Exception):
    """Whoever asked is not there any more; what it asked for is cancelled."""


@dataclass(eq=False)
class Ticket:
    """A picture that is asked for.

    Attributes:
        id: its name in addresses, the history and the journal.
        request: with its files' places.
        way: through which it came: "sdapi", "openai" or "jobs".
        job: the engine's; None when it has ended.
        ended: is set with None once the picture is kept, or with what became of it instead.
        since: when it was accepted, in seconds.
    """

    id: str
    request: Request
    way: str
    job: Any
    ended: asyncio.Future[End | None]
    since: float = field(default_factory=time.monotonic)

    @property
    def status(self) -> str:
        """One of queued, running, done, failed, cancelled, returned."""
        if self.ended.done():
            end = self.ended.result()
            return "done" if end is None else end.status
        if self.job is None:  # on its way to the engine
            return "queued"
        # What is drawn is on its way to the disk.
        return "queued" if self.job.status == "queued" else "running"

    @property
    def steps(self) -> tuple[int, int]:
        """Steps that are drawn, of all."""
        job = self.job
        if job is None:
            return self.request.steps if self.ended.done() else 0, self.request.steps
        return job.step, job.steps or self.request.steps

    def cancel(self) -> None:
        """Free its place; without effect on one that has ended."""
        if self.job is not None:
            self.job.cancel()


class Desk:
    """Takes requests, and keeps what becomes of them.

    Args:
        engine: that draws (``bdm.Engine``, or one of its kind).
        names: finds files.
        history: keeps pictures.
        limits: of each request.
        metrics: counts.
    """

    def __init__(self, engine: Any, names: Names, history: History, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.names, self.history, self.limits = engine, names, history, limits
        self.metrics = metrics
        self.stopping = False
        self._live: dict[str, Ticket] = {}
        self._ended: OrderedDict[str, Ticket] = OrderedDict()
        self._ending: set[asyncio.Task[None]] = set()
        self._handed_back, self._until = False, 0.0
        metrics.watch(self)

    @property
    def live(self) -> list[Ticket]:
        """Those that wait or are drawn, the oldest first."""
        return list(self._live.values())

    def ticket(self, name: str) -> Ticket | None:
        """A ticket that is live, or has ended not long ago."""
        return self._live.get(name) or self._ended.get(name)

    async def take(self, requests: Sequence[Request], way: str) -> list[Ticket]:
        """Accept requests, all or none.

        Raises:
            Refused: the server stops, or too many wait.
            UserError: a limit, a file that is not here, or whatever the engine refuses.
        """
        if self.stopping:
            raise Refused("the server is stopping; ask again in a moment", 503, 5)
        self.limits.check_count(len(requests))
        if len(self._live) + len(requests) > self.limits.queue:
            raise Refused(
                f"{len(self._live)} pictures wait already; ask again later", 429, self.wait_seconds()
            )
        tickets: list[Ticket] = []
        try:
            for request in await asyncio.to_thread(self.checked, requests):
                tickets.append(await self._accepted(request, way))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def wait_seconds(self) -> int:
        """About how long the pictures that wait will take."""
        return int(min(120, max(1, len(self._live) * self.metrics.usual_seconds())))

    def checked(self, requests: Iterable[Request]) -> list[Request]:
        """Requests within the limits, whose files all have their places.

        Raises:
            UserError: a limit, or a file that is not here.
        """
        found = []
        for request in requests:
            self.limits.check(request)  # before anything is worked out from its numbers
            resolved = self.names.resolved(request)
            self.limits.check(resolved, self.names.start_size(resolved))
            found.append(with_chosen(resolved))
        return found

    async def _accepted(self, request: Request, way: str) -> Ticket:
        loop = asyncio.get_running_loop()
        ticket = Ticket(new_id(), request, way, None, loop.create_future())
        self._live[ticket.id] = ticket  # its place is taken before anybody else can take it
        try:
            ticket.job = await asyncio.to_thread(self.engine.submit, request)
        except BaseException as error:
            del self._live[ticket.id]
            if isinstance(error, QueueFull):
                raise Refused(str(error), 429, self.wait_seconds()) from None
            raise
        try:
            await asyncio.to_thread(self.history.accept, ticket.id, request, way)
        except BaseException:
            ticket.cancel()
            raise
        finally:
            ticket.job.add_done_callback(lambda *_: _call(loop, self._begin_ending, ticket))
        self.metrics.accepted.labels(way).inc()
        return ticket

    def _begin_ending(self, ticket: Ticket) -> None:
        if ticket.id in self._live and not ticket.ended.done():
            task = asyncio.get_running_loop().create_task(self._end(ticket))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self, ticket: Ticket) -> None:
        """Keep what the engine gave, or note what became of it."""
        end = await asyncio.to_thread(self._kept, ticket)
        self._live.pop(ticket.id, None)
        self._ended[ticket.id] = ticket
        while len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        ticket.job = None  # and the picture in it
        self.metrics.ended(ticket.way, "done" if end is None else end.status, time.monotonic() - ticket.since)
        if not ticket.ended.done():
            ticket.ended.set_result(end)

    def _kept(self, ticket: Ticket) -> End | None:
        status = ticket.job.status
        try:
            if status == "cancelled":
                end = self._cancelled(ticket)
            else:
                self.history.keep(ticket.id, ticket.job.result(timeout=0))
                return None
        except UserError as error:
            end = End(ticket.id, "failed", str(error))
        except Exception as error:  # a request may make any library fail
            end = End(ticket.id, "failed", f"{type(error).__name__}: {first_line(error, 300)}", fault=True)
        with suppress(OSError):  # a full disk ends no other request
            self.history.end(end)
        return end

    def _cancelled(self, ticket: Ticket) -> End:
        if self._handed_back:
            why = "the server stopped before this was drawn; ask again"
            return End(ticket.id, "returned", why, ticket.request.to_json())
        return End(ticket.id, "cancelled", "cancelled")

    async def wait(self, tickets: Sequence[Ticket], left: Callable[[], Awaitable[bool]]) -> list[Path | End]:
        """What becomes of tickets: a picture's file, or why there is none.

        Args:
            tickets: of one client.
            left: whether the client has left.

        Raises:
            ClientLeft: the client has left; its tickets are cancelled.
        """
        waiting: set[asyncio.Future[End | None]] = {ticket.ended for ticket in tickets}
        try:
            while waiting:
                _, waiting = await asyncio.wait(waiting, timeout=_LOOK)
                if waiting and await left():
                    raise ClientLeft
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return [self.outcome(ticket) for ticket in tickets]

    def outcome(self, ticket: Ticket) -> Path | End:
        """What became of a ticket that has ended."""
        end = ticket.ended.result()
        place = self.history.picture(ticket.id)
        if end is None and place is None:
            return End(ticket.id, "failed", "the picture has been removed")
        return end or place or End(ticket.id, "failed")

    async def stop(self, grace: float) -> None:
        """Take no more; finish what is accepted; after some seconds hand back what is not drawn by then."""
        self.stopping = True
        self._until = self._until or time.monotonic() + grace  # who asks again waits for the same end
        while self._live and time.monotonic() < self._until:
            await asyncio.sleep(0.05)
        self._handed_back = True
        for ticket in self.live:
            ticket.cancel()
        until = time.monotonic() + 10
        while (self._live or self._ending) and time.monotonic() < until:
            await asyncio.sleep(0.05)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
    with suppress(RuntimeError):  # the loop has ended; the journal tells what is lost
        loop.call_soon_threadsafe(function, *arguments)
