"""``/sdapi/v1``: what A1111's clients call, on the same queue as everything else."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from ..drawing.picture_reading import picture_texts, texts_in
from ..drawing.request import Request as Drawing
from .answers import NotDrawn, picture_base64
from .desk import Desk
from .history import End
from .sdapi_bodies import ImageToImage, Options, PictureBody, TextToImage, without_effect
from .sdapi_requests import Reader, several
from .uploads import decoded, opened


def sdapi_routes(desk: Desk, reader: Reader) -> APIRouter:
    """The routes that draw, and those that look at it or stop it."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])
    usual = Options()

    @routes.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> dict[str, Any]:
        found = await asyncio.to_thread(reader.text_to_image, body, usual)
        return await _drawn(desk, request, body, *found)

    @routes.post("/img2img")
    async def img2img(body: ImageToImage, request: Request) -> dict[str, Any]:
        found = await asyncio.to_thread(reader.image_to_image, body, usual)
        return await _drawn(desk, request, body, *found)

    @routes.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        return await _progress(desk, not skip_current_image)

    @routes.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        return _cancel(desk, ("running",))

    @routes.post("/skip")
    async def skip() -> dict[str, Any]:
        return _cancel(desk, ("running",))

    @routes.post("/png-info")
    async def png_info(body: PictureBody) -> dict[str, Any]:
        return await asyncio.to_thread(_info_of, decoded(body.image), desk.limits.upload)

    @routes.get("/options")
    async def options() -> dict[str, Any]:
        known = usual.model_dump(include=set(Options.model_fields))
        known["sd_model_checkpoint"] = known["sd_model_checkpoint"] or desk.names.model.name
        return known | {"sd_checkpoint_hash": desk.names.model.hash, "samples_format": "png"}

    @routes.post("/options")
    async def set_options(body: Options) -> dict[str, Any]:
        # What no picture could be drawn with would be in the way of all who come later.
        smallest = TextToImage.model_validate({"width": 8, "height": 8, "steps": 1})
        found, _, _ = await asyncio.to_thread(reader.text_to_image, smallest, body)
        await asyncio.to_thread(desk.checked, [found])
        for name in body.model_fields_set & set(Options.model_fields):
            setattr(usual, name, getattr(body, name))
        return {"ignored": without_effect(body)}

    return routes


async def _drawn(
    desk: Desk, http: Request, body: Any, request: Drawing, count: int, ignored: list[str]
) -> dict[str, Any]:
    """Draw, and answer as A1111 does."""
    desk.limits.check_count(count)
    tickets = await desk.take(several(request, count), "sdapi")
    ends = await desk.wait(tickets, http.is_disconnected)
    for end in ends:
        if isinstance(end, End) and end.status != "cancelled":
            raise NotDrawn(end)
    places = [end for end in ends if isinstance(end, Path)]
    answer = await asyncio.to_thread(
        _answer, tickets[0].request, places, ignored, body.send_images is not False
    )
    said = body.model_dump(exclude_none=True, exclude={"init_images", "mask", "alwayson_scripts"})
    return answer | {"parameters": {name: said[name] for name in said if name not in ignored}}


def _answer(request: Drawing, places: list[Path], ignored: list[str], send: bool) -> dict[str, Any]:
    texts = [picture_texts(place) for place in places]
    drawn = [Drawing.from_json(said) for _, said in texts]
    first = drawn[0] if drawn else request
    count = max(1, len(drawn))
    info = {
        "prompt": first.prompt or first.prompt_en,
        "all_prompts": [first.prompt or first.prompt_en] * count,
        "negative_prompt": first.negative or first.negative_en,
        "all_negative_prompts": [first.negative or first.negative_en] * count,
        "native_prompt": first.prompt,
        "english_prompt": first.prompt_en,
        "native_negative_prompt": first.negative,
        "english_negative_prompt": first.negative_en,
        "seed": first.seed,
        "all_seeds": [one.seed for one in drawn],
        "subseed": first.seed,
        "all_subseeds": [one.seed for one in drawn],
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": first.sampler,
        "cfg_scale": first.guidance,
        "steps": first.steps,
        "batch_size": count,
        "denoising_strength": dict(first.mode.settings).get("strength"),
        "sd_model_name": first.model.name if first.model else "",
        "sd_model_hash": first.model.hash if first.model else "",
        "clip_skip": first.clip_skip,
        "infotexts": [text for text, _ in texts],
        "ids": [place.stem for place in places],
        "interrupted": not places,
        "ignored": ignored,
    }
    images = [picture_base64(place) for place in places] if send else []
    return {"images": images, "info": json.dumps(info, ensure_ascii=False)}


async def _progress(desk: Desk, with_picture: bool) -> dict[str, Any]:
    """Of what is being drawn, as one."""
    tickets = desk.live
    done, whole = sum(one.steps[0] for one in tickets), sum(one.steps[1] for one in tickets)
    running = next((one for one in tickets if one.status == "running"), None)
    shown = await _preview(running.job) if running is not None and with_picture else None
    step, steps = running.steps if running is not None else (0, 0)
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": desk.stopping,
        "job": running.id if running is not None else "",
        "job_count": len(tickets),
        "job_timestamp": "",
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    }
    share = done / whole if whole else 0.0
    eta = desk.wait_seconds() * (1 - share) if tickets else 0.0
    return {
        "progress": share,
        "eta_relative": eta,
        "state": state,
        "current_image": shown,
        "textinfo": None,
    }


async def _preview(job: Any) -> str | None:
    picture = None if job is None else await asyncio.to_thread(job.preview)
    if picture is None:
        return None
    written = io.BytesIO()
    picture.save(written, "png")
    return base64.b64encode(written.getvalue()).decode()


def _cancel(desk: Desk, states: tuple[str, ...]) -> dict[str, Any]:
    """Cancel what A1111's clients have running here; others' pictures are theirs."""
    found = [one for one in desk.live if one.way == "sdapi" and one.status in states]
    for ticket in found:
        ticket.cancel()
    return {"cancelled": len(found)}


def _info_of(content: bytes, most: int) -> dict[str, Any]:
    opened(content, most)  # what is no picture, or too large, is refused before its texts are read
    parameters, said = texts_in(content)
    items = {"parameters": parameters} if parameters else {}
    return {"info": parameters, "items": items, "parameters": {}, "request": _json(said)}


def _json(said: str) -> Any:
    try:
        return Drawing.from_json(said).to_json() if said else None
    except ValueError:
        return None
