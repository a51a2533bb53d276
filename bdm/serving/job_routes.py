"""``/v1/jobs``: requests as they are, that are watched, cancelled and looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import ConfigDict
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from ..drawing.request import Request as Drawing
from .desk import Desk, Ticket
from .events import ended, events
from .history import End
from .sdapi_bodies import Body
from .sdapi_requests import seed, several

_STREAM = "text/event-stream"


class Jobs(Body):
    """The body: a request as ``bdm info --json`` prints it, or a part of one, and how often."""

    model_config = ConfigDict(extra="forbid")

    request: dict[str, Any]
    count: int = 1


def job_routes(desk: Desk) -> APIRouter:
    """The routes of jobs."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @routes.post("", status_code=202)
    async def make(body: Jobs, request: Request) -> Response:
        desk.limits.check_count(body.count)
        tickets = await desk.take(several(asked(body.request), body.count), "jobs")
        if _STREAM in request.headers.get("accept", ""):
            return _stream(desk, tickets, request, owned=True)
        return JSONResponse({"jobs": [described(desk, ticket) for ticket in tickets]}, 202)

    @routes.get("")
    async def list_jobs() -> dict[str, Any]:
        lost = [{"id": end.id, "status": end.status, "error": end.why} for end in desk.history.lost[:100]]
        return {"jobs": [described(desk, ticket) for ticket in desk.live], "lost": lost}

    @routes.get("/{name}")
    async def look(name: str) -> dict[str, Any]:
        ticket = desk.ticket(name)
        return described(desk, ticket) if ticket is not None else _remembered(desk, name)

    @routes.get("/{name}/events")
    async def watch(name: str, request: Request, previews: bool = True) -> Response:
        return _stream(desk, [_known(desk, name)], request, previews)

    @routes.get("/{name}/picture")
    async def picture(name: str) -> Response:
        return FileResponse(_picture(desk, name), media_type="image/png")

    @routes.delete("/{name}")
    async def cancel(name: str) -> dict[str, Any]:
        ticket = _known(desk, name)
        ticket.cancel()
        return described(desk, ticket)

    return routes


def asked(said: dict[str, Any]) -> Drawing:
    """A request that a client wrote; without a seed, or with -1, it has one that nobody chose.

    Raises:
        UserError: names an unknown key, or a value of another kind.
    """
    own = {name: value for name, value in said.items() if name != "versions"}
    if own.get("seed") in (None, -1):
        own["seed"] = seed(None)
    return Drawing.from_json(own | {"precision": None, "versions": Drawing().to_json()["versions"]})


def described(desk: Desk, ticket: Ticket) -> dict[str, Any]:
    """A job as clients see it."""
    step, steps = ticket.steps
    said = {
        "id": ticket.id,
        "status": ticket.status,
        "step": step,
        "steps": steps,
        "seed": ticket.request.seed,
        "events": f"/v1/jobs/{ticket.id}/events",
    }
    if ticket.ended.done():
        said |= ended(desk, ticket)[1]
    return said


def _remembered(desk: Desk, name: str) -> dict[str, Any]:
    """A job of long ago, or of a server before this one."""
    if desk.history.picture(name) is not None:
        return {"id": name, "status": "done", "picture": f"/v1/jobs/{name}/picture"}
    end = desk.history.ended(name)
    if end is None:
        raise HTTPException(404, "no such job")
    return {"id": name, "status": end.status, "error": end.why, "request": end.request}


def _known(desk: Desk, name: str) -> Ticket:
    ticket = desk.ticket(name)
    if ticket is None:
        said = _remembered(desk, name)
        raise HTTPException(410, f"this job is over: {said['status']}")
    return ticket


def _picture(desk: Desk, name: str) -> Path:
    place = desk.history.picture(name)
    if place is None:
        ticket = desk.ticket(name)
        outcome = None if ticket is None or not ticket.ended.done() else desk.outcome(ticket)
        why = f": {outcome.status}, {outcome.why}" if isinstance(outcome, End) else ""
        raise HTTPException(404, f"no picture of this name{why}")
    return place


def _stream(
    desk: Desk, tickets: list[Ticket], request: Request, previews: bool = True, owned: bool = False
) -> Response:
    stream = events(desk, tickets, request.is_disconnected, previews, owned)
    return StreamingResponse(stream, media_type=_STREAM, headers={"x-accel-buffering": "no"})
