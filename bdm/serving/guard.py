"""What every request to a server passes first: whose it is, how long its body is; and what answers carry.

Plain ASGI, so that a route still sees that its client has left.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Access
from .metrics import Metrics

#: Answered without a key: whether the server runs, and the page, which asks for the key.
_OPEN = ("/healthz", "/readyz", "/", "/favicon.ico")
_OPEN_BELOW = "/page/"
#: Of every answer.
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """Lets requests through to an application, or answers them itself.

    Args:
        app: the application.
        access: who may use it.
        body: bytes of a request's body at most.
        metrics: counts answers.
    """

    def __init__(self, app: ASGIApp, access: Access, body: int, metrics: Metrics) -> None:
        self._app, self._access, self._body, self._metrics = app, access, body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        sending = _Sending(send, self._metrics)
        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, sending)
            return
        await self._app(scope, _Bounded(receive, self._body), sending)

    def _refused(self, scope: Scope) -> JSONResponse | None:
        """An answer in place of the application's, or None."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not self._access.knows_host(host):
            return _answer(400, "the Host header names another machine; call this server as localhost")
        if origin and not self._access.knows_origin(origin, host):
            return _answer(
                403, "this page may not call the server; start it with --cors and the page's origin"
            )
        is_open = scope["path"] in _OPEN or scope["path"].startswith(_OPEN_BELOW)
        if not is_open and scope["method"] != "OPTIONS" and not self._access.accepts(scope["headers"]):
            return _answer(
                401, "an API key is needed", {"www-authenticate": 'Basic realm="bdm", charset="UTF-8"'}
            )
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._body:
            return _answer(413, f"a body of {length[:20]} bytes; this server takes {self._body}")
        return None


class _Bounded:
    """Receives a body, as long as it is allowed to be."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._left = receive, most, most

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, f"a body of more than {self._most} bytes")
        return message


class _Sending:
    """Sends an answer with what all of them carry, and counts it."""

    def __init__(self, send: Send, metrics: Metrics) -> None:
        self._send, self._metrics = send, metrics

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
            self._metrics.answers.labels(str(message["status"])).inc()
        await self._send(message)


def _answer(code: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body: dict[str, Any] = {
        "error": {"message": why, "type": "invalid_request_error", "code": code},
        "detail": why,
    }
    return JSONResponse(body, code, headers=headers)
