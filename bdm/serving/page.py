"""The page: plain files beside this module, read once; nobody's path is opened."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.responses import Response

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_routes() -> APIRouter:
    """``/`` and the files that it needs."""
    routes = APIRouter(include_in_schema=False)
    folder = Path(__file__).parent / "page"
    files = {path.name: (path.read_bytes(), _KINDS[path.suffix]) for path in folder.iterdir()}

    @routes.get("/")
    async def page() -> Response:
        return _answer(*files["index.html"])

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file")
        return _answer(*files[name])

    return routes


def _answer(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})
