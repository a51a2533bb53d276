"""A real server on a loopback port, in a thread."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
from serving_fake import FakeEngine

from bdm.serving.app import Settings, build
from bdm.serving.server import listening, serve, server


@contextmanager
def running(history, make_engine=None, seconds=0.0, **settings):
    """Gives the address of a server, a client of it, and what it was built of."""
    served = build(
        Settings(history=history, **settings), make_engine or (lambda library: FakeEngine(library, seconds))
    )
    bound = listening("127.0.0.1", 0)
    port = bound.getsockname()[1]
    http, started = server(served), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(http, served, bound, started.set)))
    thread.start()
    assert started.wait(120)
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            yield SimpleNamespace(
                address=address,
                port=port,
                client=client,
                served=served,
                desk=served.desk,
                http=http,
                thread=thread,
            )
    finally:
        http.should_exit = True
        thread.join(180)
        assert not thread.is_alive()
