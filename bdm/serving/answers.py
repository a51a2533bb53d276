"""Answers of a server that all its routes share: mistakes in one line, pictures in base64."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import UserError, printable
from .desk import ClientLeft, Refused
from .history import End

logger = logging.getLogger("bdm")

#: What nginx calls a client that has left; nobody reads it.
CLIENT_LEFT = 499


class NotDrawn(UserError):
    """A picture that was accepted and is not there.

    Attributes:
        end: what became of it.
    """

    def __init__(self, end: End) -> None:
        super().__init__(end.why or end.status)
        self.end = end


def answer_mistakes(app: FastAPI) -> None:
    """Have an application answer what routes raise, in one line and without what the client sent."""
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(ClientLeft, lambda request, error: Response(status_code=CLIENT_LEFT))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def mistake(code: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says what is wrong, where A1111's and OpenAI's clients look for it."""
    kind = "invalid_request_error" if code < 500 else "server_error"
    said = printable(why, 2000)
    body: dict[str, Any] = {
        "error": {"message": said, "type": kind, "param": None, "code": code},
        "detail": said,
    }
    return JSONResponse(body, code, headers=headers)


def picture_base64(place: Path) -> str:
    """A picture's file in base64."""
    return base64.b64encode(place.read_bytes()).decode()


def compact(content: Any) -> str:
    """JSON on one line; halves of characters become escapes."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def _user_error(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, Refused):
        return mistake(error.code, str(error), {"retry-after": str(error.after)})
    if isinstance(error, NotDrawn) and error.end.status == "returned":
        return mistake(503, str(error), {"retry-after": "5"})
    if isinstance(error, NotDrawn) and error.end.fault:
        return mistake(500, str(error))
    return mistake(422, str(error))


def _invalid(request: Request, error: Any) -> JSONResponse:
    wrong = []
    for one in error.errors()[:10]:
        place = ".".join(str(part) for part in one.get("loc", ())[1:])
        wrong.append(f"{place}: {one.get('msg', '')}" if place else str(one.get("msg", "")))
    return mistake(422, "; ".join(wrong))


def _http(request: Request, error: Any) -> JSONResponse:
    return mistake(error.status_code, str(error.detail), error.headers)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s", request.method, printable(request.url.path, 200), exc_info=error)
    return mistake(500, "an error of the server; its log says more")
