"""Server-sent events: how pictures come along, with previews."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from .answers import compact
from .desk import Desk, Ticket
from .history import End

#: Seconds between two looks at a job, between two previews of one, and between signs of life.
_LOOK, _PREVIEW, _BEAT = 0.05, 0.25, 10.0
#: Pixels of a preview's longer side.
_PREVIEW_SIDE = 512


async def events(
    desk: Desk,
    tickets: Sequence[Ticket],
    left: Callable[[], Awaitable[bool]],
    previews: bool = True,
    owned: bool = False,
) -> AsyncIterator[str]:
    """What happens to tickets, until all of them have ended or nobody listens.

    "queued" and "running" tell the state, "step" the steps that are drawn, "preview" has a picture so far as
    PNG in base64, "done" says where the picture is, "failed", "cancelled" and "returned" why there is none,
    and "end" is the last.

    Args:
        desk: that took them.
        tickets: of one client, or watched by it.
        left: whether the client has left.
        previews: whether pictures are sent before they are finished.
        owned: tickets are cancelled when the client leaves.
    """
    watches = [_Watch(ticket, previews) for ticket in tickets]
    beat = time.monotonic()
    try:
        while watches:
            for watch in watches:
                async for event in watch.news(desk):
                    yield event
                    beat = time.monotonic()
            watches = [watch for watch in watches if not watch.over]
            if watches and await left():
                return
            if time.monotonic() - beat > _BEAT:
                yield ": still here\n\n"
                beat = time.monotonic()
            await asyncio.sleep(_LOOK if watches else 0)
        yield _event("end", {"ids": [ticket.id for ticket in tickets]})
    finally:
        if owned:
            for ticket in tickets:
                ticket.cancel()


class _Watch:
    """Tells what is new of one ticket."""

    def __init__(self, ticket: Ticket, previews: bool) -> None:
        self._ticket, self._previews = ticket, previews
        self._told: tuple[str, int] = ("", 0)
        self._shown = (0.0, 0)
        self.over = False

    async def news(self, desk: Desk) -> AsyncIterator[str]:
        ticket = self._ticket
        if ticket.ended.done():
            self.over = True
            yield _event(*ended(desk, ticket))
            return
        status, (step, steps) = ticket.status, ticket.steps
        if status != self._told[0]:
            yield _event(status, {"id": ticket.id, "step": step, "steps": steps})
        if step != self._told[1]:
            yield _event("step", {"id": ticket.id, "step": step, "steps": steps})
        self._told = status, step
        async for event in self._preview(step, steps):
            yield event

    async def _preview(self, step: int, steps: int) -> AsyncIterator[str]:
        job, (when, told) = self._ticket.job, self._shown
        if not self._previews or job is None or step == told or time.monotonic() - when < _PREVIEW:
            return
        shown = None
        with suppress(Exception):  # a preview that cannot be had ends no picture
            shown = await asyncio.to_thread(_shown, job)
        self._shown = time.monotonic(), step
        if shown is not None:
            yield _event("preview", {"id": self._ticket.id, "step": step, "steps": steps, "image": shown})


def ended(desk: Desk, ticket: Ticket) -> tuple[str, dict[str, Any]]:
    """(event, content) of a ticket that has ended."""
    outcome = desk.outcome(ticket)
    if isinstance(outcome, End):
        return outcome.status, {"id": ticket.id, "error": outcome.why}
    return "done", {"id": ticket.id, "picture": f"/v1/jobs/{ticket.id}/picture"}


def _shown(job: Any) -> str | None:
    picture: Image.Image | None = job.preview()
    if picture is None:
        return None
    if max(picture.size) > _PREVIEW_SIDE:
        picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    written = io.BytesIO()
    picture.save(written, "png")
    return base64.b64encode(written.getvalue()).decode()


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {compact(content)}\n\n"
