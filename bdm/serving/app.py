"""The application: routes, who may use them, and the parts behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from .answers import answer_mistakes, mistake
from .desk import Desk
from .guard import Guard
from .history import History
from .job_routes import job_routes
from .keys import Access
from .limits import Limits
from .metrics import Metrics
from .names import Names, served_library
from .openai_images import openai_routes
from .page import page_routes
from .sdapi import sdapi_routes
from .sdapi_lists import sdapi_lists
from .sdapi_requests import Reader
from .shelf import shelf_routes
from .uploads import Uploads


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        history: folder of pictures and journal.
        access: who may use it.
        limits: of each request.
        models: folders that names are looked for in.
        model: the pipeline of requests that name none; None for the shipped one.
        prompts: how a ``prompt`` without ``native_prompt`` is read (see ``Reader``).
        grace: seconds in which a stop finishes what was accepted.
        page: whether "/" is the page.
    """

    history: Path
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    models: Sequence[str | Path] = ()
    model: str | None = None
    prompts: str = "split"
    grace: float = 30.0
    page: bool = False


@dataclass
class Served:
    """An application and what stands behind it.

    Attributes:
        app: for an ASGI server.
        desk: its queue.
        history: its pictures.
        settings: its settings.
    """

    app: Any
    desk: Desk
    history: History
    settings: Settings


def build(settings: Settings, make_engine: Callable[[Any], Any]) -> Served:
    """The application of some settings.

    Args:
        settings: of the server.
        make_engine: the engine that draws, given the library of the models' folders.

    Raises:
        UserError: a folder that is not there, is another server's, or cannot be written.
    """
    library = served_library(settings.models)
    history = History(settings.history)
    metrics = Metrics()
    uploads = Uploads(history.uploads, settings.limits.upload)
    names = Names(library, uploads, settings.model)
    desk = Desk(make_engine(library), names, history, settings.limits, metrics)
    app = FastAPI(title="bdm", docs_url=None, redoc_url=None, lifespan=_lifespan(desk, settings.grace))
    served = Served(_guarded(app, settings, metrics), desk, history, settings)
    answer_mistakes(app)
    _health(app, desk, metrics)
    reader = Reader(names, uploads, settings.prompts)
    for routes in (
        sdapi_routes(desk, reader),
        sdapi_lists(desk),
        openai_routes(desk, reader),
        job_routes(desk),
        shelf_routes(desk, reader, uploads),
    ):
        app.include_router(routes)
    if settings.page:
        app.include_router(page_routes())
    return served


def _guarded(app: FastAPI, settings: Settings, metrics: Metrics) -> Any:
    access = settings.access
    shared = CORSMiddleware(
        Guard(app, access, settings.limits.body, metrics),
        allow_origins=access.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "x-api-key", "accept"],
        expose_headers=["retry-after"],
    )
    return shared if access.origins else shared.app


def _lifespan(desk: Desk, grace: float) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.stop(grace)
        await asyncio.to_thread(desk.engine.close, True)
        desk.history.close()

    return lifespan


def _health(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        return {"status": "running"}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        if desk.stopping:
            return mistake(503, "stopping", {"retry-after": "5"})
        full = len(desk.live) >= desk.limits.queue
        if full:
            return mistake(503, "too many pictures wait", {"retry-after": str(desk.wait_seconds())})
        return JSONResponse({"status": "ready", "waiting": len(desk.live)})

    @app.get("/metrics", tags=["health"])
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
