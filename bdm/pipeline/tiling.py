"""Large pictures: the VAE works on overlapping tiles, whose seams are blended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..plugins.parameters import plain

#: From how many pixels on tiles are used where nothing is said.
TILED_FROM = 1536 * 1536


@contextmanager
def tiled_vae(pipe: Any, width: int, height: int, tiling: bool | None = None) -> Iterator[None]:
    """Let a pipeline's VAE work in tiles, where a picture is large.

    Tiles take the memory of one tile whatever the picture's size, and change it a little (group norms see a
    tile alone).

    Args:
        pipe: the pipeline.
        width: of the picture in pixels.
        height: likewise.
        tiling: always or never; None for large pictures alone.
    """
    wanted = width * height >= TILED_FROM if tiling is None else tiling
    vae: Any = plain(pipe.vae)
    before = getattr(vae, "use_tiling", None)
    if before is None or before == wanted or (tiling is None and not wanted):
        yield
        return
    vae.use_tiling = wanted
    try:
        yield
    finally:
        vae.use_tiling = before
