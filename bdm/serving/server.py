"""Runs the application until somebody stops it, and stops it so that nothing accepted is forgotten."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ..errors import UserError, printable
from .app import Served

logger = logging.getLogger("bdm")

#: Seconds that answers have to reach their clients after the last picture.
_LAST_ANSWERS = 12


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is in use, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(256)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {printable(host, 100)} --port {port}: {why}; choose others") from None
    return bound


def server(served: Served) -> uvicorn.Server:
    """The HTTP server of an application."""
    config = uvicorn.Config(
        served.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(served.settings.grace) + _LAST_ANSWERS,
        h11_max_incomplete_event_size=64 * 1024,
        timeout_keep_alive=10,
        lifespan="on",
        ws="none",
    )
    return uvicorn.Server(config)


async def serve(
    http: uvicorn.Server, served: Served, bound: socket.socket, ready: Callable[[], Any] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT; then take no more, finish what is accepted, and hand back the rest.

    Args:
        http: of ``server``.
        served: its application.
        bound: of ``listening``.
        ready: is called when requests are taken.
    """
    watching = asyncio.create_task(_watch(http, served, ready))
    try:
        await http.serve([bound])
    finally:
        http.should_exit = True
        await watching


async def _watch(http: uvicorn.Server, served: Served, ready: Callable[[], Any]) -> None:
    while not http.started and not http.should_exit:
        await asyncio.sleep(0.02)
    ready()
    while not http.should_exit:
        await asyncio.sleep(0.05)
    waiting = len(served.desk.live)
    if waiting:
        logger.warning("stopping: %d pictures are finished first", waiting)
    await served.desk.stop(served.settings.grace)


def run(served: Served, bound: socket.socket, ready: Callable[[], Any]) -> None:
    """Serve in this thread, which is the process's main one, until a signal ends it."""
    http = server(served)
    with _quiet_signals():
        asyncio.run(serve(http, served, bound, ready))


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """The server raises the signals again that ended it; here they have done their work."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
