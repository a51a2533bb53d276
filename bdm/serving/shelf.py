"""What the page shows beside the jobs: the history, the files of the folders of models, what pictures say."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import ConfigDict
from starlette.responses import Response

from ..drawing.complete import default_guidance
from ..drawing.model_list import list_models
from ..drawing.picture_reading import picture_request, texts_in
from ..drawing.request import Request as Drawing
from ..errors import UserError
from ..models.sampler_names import SAMPLERS
from ..models.sigma_schedules import SCHEDULES
from .desk import Desk
from .history import History
from .names import own_size
from .sdapi_bodies import Body
from .sdapi_requests import Reader
from .uploads import Uploads, opened

#: Pixels of a preview's longer side, and pixels of its file at most.
_PREVIEW_SIDE, _PREVIEW_PIXELS = 384, 40_000_000


class Box(Body):
    """A prompt in one box."""

    model_config = ConfigDict(extra="forbid")

    text: str


def shelf_routes(desk: Desk, reader: Reader, uploads: Uploads) -> APIRouter:
    """Routes that draw nothing."""
    routes = APIRouter(prefix="/v1", tags=["shelf"])

    @routes.get("/history")
    async def history(before: str = "", limit: int = 30) -> dict[str, Any]:
        limit = min(max(1, limit), 100)
        return await asyncio.to_thread(_page, desk.history, before[:40], limit)

    @routes.delete("/history/{name}")
    async def remove(name: str) -> dict[str, Any]:
        if not await asyncio.to_thread(desk.history.remove, name):
            raise HTTPException(404, "no picture of this name")
        return {"removed": name}

    @routes.get("/server")
    async def server() -> dict[str, Any]:
        return await asyncio.to_thread(_server, desk)

    @routes.get("/library")
    async def library() -> dict[str, Any]:
        return {"files": await asyncio.to_thread(_files, desk)}

    @routes.get("/library/{found}/preview")
    async def preview(found: str) -> Response:
        return Response(await asyncio.to_thread(_preview, desk, found), media_type="image/webp")

    @routes.post("/split")
    async def split(body: Box) -> dict[str, str]:
        if len(body.text) > desk.limits.text:
            raise UserError(f"a prompt of {len(body.text)} characters; this server allows {desk.limits.text}")
        native, english = await asyncio.to_thread(reader.sides, body.text)
        return {"native": native, "english": english}

    @routes.post("/pictures")
    async def keep(request: Request) -> dict[str, Any]:
        file = await asyncio.to_thread(uploads.keep, await request.body())
        return {"name": file.name, "hash": file.hash}

    @routes.post("/info")
    async def info(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(_said, await request.body(), desk.limits.upload)

    return routes


def _page(history: History, before: str, limit: int) -> dict[str, Any]:
    names = history.page(before, limit + 1)
    pictures = []
    for name in names[:limit]:
        place = history.picture(name)
        if place is not None:
            pictures.append({"id": name, "picture": f"/v1/jobs/{name}/picture", "request": _request(place)})
    return {"pictures": pictures, "more": len(names) > limit}


def _request(place: Path) -> dict[str, Any] | None:
    try:
        return picture_request(place).to_json()
    except UserError:
        return None


def _server(desk: Desk) -> dict[str, Any]:
    model = desk.names.model
    width, height = own_size(Path(str(model.source)))
    return {
        "model": {"name": model.name, "hash": model.hash, "width": width, "height": height},
        "guidance": default_guidance(model),
        "samplers": list(SAMPLERS),
        "schedules": ["Automatic", *SCHEDULES],
        "limits": desk.limits.__dict__,
    }


def _files(desk: Desk) -> list[dict[str, Any]]:
    shown = ("name", "kind", "base", "trigger words", "hash")
    found = []
    for row in list_models(desk.names.library):
        said: dict[str, Any] = {name: row[name] for name in shown}
        said["file"] = Path(row["file"]).name
        said["preview"] = f"/v1/library/{row['hash']}/preview" if row["preview"] and row["hash"] else ""
        found.append(said)
    return found


def _preview(desk: Desk, found: str) -> bytes:
    """The picture beside a file, made small.

    Raises:
        HTTPException: there is none; one that a link brings from elsewhere counts as none.
    """
    for row in list_models(desk.names.library):
        place = Path(row["file"]).parent / row["preview"]
        if row["hash"] == found and row["preview"] and _is_beside(place, Path(row["file"])):
            picture = opened(place.read_bytes(), _PREVIEW_PIXELS)
            picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
            written = io.BytesIO()
            picture.save(written, "webp")
            return written.getvalue()
    raise HTTPException(404, "no preview")


def _is_beside(place: Path, file: Path) -> bool:
    return os.path.dirname(os.path.realpath(place)) == os.path.realpath(file.parent)


def _said(content: bytes, most: int) -> dict[str, Any]:
    opened(content, most)  # what is no picture, or too large, is refused before its texts are read
    parameters, said = texts_in(content)
    if not said:
        raise UserError(
            "the picture carries no request of bdm's, so its settings cannot be restored"
            + ("; A1111's text alone does not tell all" if parameters else "")
        )
    return {"parameters": parameters, "request": Drawing.from_json(said, "the picture's JSON").to_json()}
