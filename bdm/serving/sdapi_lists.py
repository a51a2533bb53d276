"""``/sdapi/v1``: the routes that say what there is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from ..drawing.model_list import list_models
from ..models.sampler_names import SAMPLERS
from ..models.sigma_schedules import SCHEDULES
from .desk import Desk
from .sdapi_requests import UPSCALERS

#: What A1111 has and this server has nothing of.
_EMPTY = ("script-info", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles")
_REFRESHED = ("checkpoints", "loras", "vae", "embeddings")


def sdapi_lists(desk: Desk) -> APIRouter:
    """The routes that say what there is."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])
    _ways_to_draw(routes)
    _files(routes, desk)
    _upscalers(routes, desk)
    _empty(routes)
    _refreshes(routes, desk)
    return routes


def _ways_to_draw(routes: APIRouter) -> None:
    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [kind.short], "options": {}} for name, kind in SAMPLERS.items()]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        names = ["Automatic", *SCHEDULES]
        return [{"name": name.lower().replace(" ", "_"), "label": name, "aliases": None} for name in names]

    @routes.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


def _files(routes: APIRouter, desk: Desk) -> None:
    @routes.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        return [_lora(row) for row in await _listed(desk, "adapter")]

    @routes.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        own = {"name": desk.names.model.name, "hash": desk.names.model.hash, "file": desk.names.model.name}
        return [_checkpoint(row) for row in [own, *await _listed(desk, "checkpoint")]]

    @routes.get("/sd-vae")
    async def vaes() -> list[dict[str, Any]]:
        rows = await _listed(desk, "vae")
        return [{"model_name": row["name"], "filename": Path(row["file"]).name} for row in rows]

    @routes.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        rows = await _listed(desk, "embedding")
        return {"loaded": {row["name"]: {"sd_checkpoint": None} for row in rows}, "skipped": {}}


def _upscalers(routes: APIRouter, desk: Desk) -> None:
    @routes.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        names = [*_plain_upscalers(), *(row["name"] for row in await _listed(desk, "upscaler"))]
        return [{"name": name, "model_name": None, "model_path": None, "scale": 2.0} for name in names]

    @routes.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, str]]:
        return [{"name": name} for name in _plain_upscalers() if name.startswith("Latent")]


def _empty(routes: APIRouter) -> None:
    async def nothing() -> list[Any]:
        return []

    for name in _EMPTY:
        routes.add_api_route(f"/{name}", nothing, methods=["GET"], operation_id=f"no_{name}")


def _refreshes(routes: APIRouter, desk: Desk) -> None:
    async def refresh() -> dict[str, Any]:
        await asyncio.to_thread(desk.names.refresh)
        return {}

    for name in _REFRESHED:
        route = f"/refresh-{name}"
        routes.add_api_route(route, refresh, methods=["POST"], operation_id=f"refresh_{name}")


async def _listed(desk: Desk, kind: str) -> list[dict[str, str]]:
    rows = await asyncio.to_thread(lambda: list(list_models(desk.names.library)))
    return [row for row in rows if row["kind"] == kind]


def _lora(row: dict[str, str]) -> dict[str, Any]:
    noted = {"trigger words": row["trigger words"], "base": row["base"], "hash": row["hash"]}
    name, file = row["name"], Path(row["file"]).name
    return {"name": name, "alias": name, "path": file, "metadata": noted}


def _checkpoint(row: dict[str, str]) -> dict[str, Any]:
    return {
        "title": f"{row['name']} [{row['hash']}]",
        "model_name": row["name"],
        "hash": row["hash"],
        "sha256": None,
        "filename": Path(row["file"]).name,
        "config": None,
    }


def _plain_upscalers() -> list[str]:
    return [name.capitalize() for name in UPSCALERS if "(" in name or " " not in name]
