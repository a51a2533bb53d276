"""``/v1/images/generations`` and ``/v1/models``: what OpenAI's clients call."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import time
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import ConfigDict

from ..drawing.model_list import list_models
from ..drawing.picture_info import picture_info
from ..drawing.picture_reading import picture_request
from ..drawing.request import Request as Drawing
from ..errors import UserError, quoted
from .answers import NotDrawn, picture_base64
from .desk import Desk
from .history import End
from .sdapi_bodies import Body, without_effect
from .sdapi_requests import Reader, checkpoint_of, seed, several

#: OpenAI's own models, by which its clients ask where nobody told them another: the server's usual one.
_OPENAIS = re.compile(r"dall-e-\d|(chat)?gpt-image-[\w.-]+")
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


class Generation(Body):
    """The body; the keys in the second half are ours."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    n: int | None = 1
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"

    native_prompt: str | None = None
    negative_prompt: str | None = None
    native_negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    branch_scale: float | None = None
    world: float | None = None


def openai_routes(desk: Desk, reader: Reader) -> APIRouter:
    """The routes of OpenAI's clients."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.post("/images/generations")
    async def generations(body: Generation, request: Request) -> dict[str, Any]:
        if body.response_format == "url":
            raise UserError("response_format is 'url'; this server gives b64_json")
        wanted = await asyncio.to_thread(_request, desk, reader, body)
        number = 1 if body.n is None else body.n
        desk.limits.check_count(number)
        tickets = await desk.take(several(wanted, number), "openai")
        ends = await desk.wait(tickets, request.is_disconnected)
        for end in ends:
            if isinstance(end, End):
                raise NotDrawn(end)
        kind = body.output_format or "png"
        data = await asyncio.to_thread(lambda: [_shown(end, kind) for end in ends if isinstance(end, Path)])
        return {
            "created": int(time.time()),
            "data": data,
            "output_format": kind,
            "ignored": without_effect(body),
        }

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        rows = await asyncio.to_thread(lambda: list(list_models(desk.names.library)))
        names = [desk.names.model.name, *(row["name"] for row in rows if row["kind"] == "checkpoint")]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "bdm"} for name in names]
        return {"object": "list", "data": data}

    return routes


def _request(desk: Desk, reader: Reader, body: Generation) -> Drawing:
    said: dict[str, Any] = {
        "steps": body.steps,
        "guidance": body.cfg_scale,
        "branch_scale": body.branch_scale,
        "world": body.world,
    }
    said = {name: value for name, value in said.items() if value is not None}
    said |= reader.texts(body.prompt, body.negative_prompt, body.native_prompt, body.native_negative_prompt)
    if body.size not in (None, "auto"):
        found = _SIZE.fullmatch(body.size)
        if found is None:
            raise UserError(f"size is {quoted(body.size)}; give one such as '512x512', or 'auto'")
        said["width"], said["height"] = int(found[1]), int(found[2])
    model = body.model or ""
    if model and model != desk.names.model.name and not _OPENAIS.fullmatch(model):
        said["model"], plugins = checkpoint_of(desk.names, model)
        said["plugins"] = tuple(plugins)
    return Drawing(seed=seed(body.seed), **said)


def _shown(place: Path, kind: str) -> dict[str, Any]:
    request = picture_request(place)
    revised = ", ".join(filter(None, (request.prompt, request.prompt_en)))
    return {"b64_json": _encoded(place, request, kind), "revised_prompt": revised, "seed": request.seed}


def _encoded(place: Path, request: Drawing, kind: str) -> str:
    if kind == "png":
        return picture_base64(place)
    written = io.BytesIO()
    with Image.open(place) as picture:
        info = picture_info(request, f".{kind}", picture.size)
        picture.convert("RGB").save(written, kind, quality=95, **info)
    return base64.b64encode(written.getvalue()).decode()
