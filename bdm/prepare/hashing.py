"""Perceptual hashes, by which near-duplicates are found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

#: The picture is shrunk to this side before the transform; the hash keeps its lowest frequencies.
SIDE, KEPT = 32, 8


def perceptual_hash(pixels: Tensor) -> int:
    """The 64-bit DCT hash of a picture.

    One bit for each of its 8x8 lowest frequencies, set where it is above their median.

    Scaling, recompression and small changes of colour keep it; another crop does not.

    Args:
        pixels: (3, H, W) uint8.
    """
    grey = (
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        .convert("L")
        .resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    )
    waves = _cosines()
    # Rounded, so that a frequency which is not there is 0 and not the sign of an error.
    low = (waves @ np.asarray(grey, dtype=np.float64) @ waves.T).round(6).flatten()
    # The first is the mean brightness, which says nothing of what is seen and would move the median.
    bits = low > np.median(low[1:])
    return int("".join("1" if bit else "0" for bit in bits), 2)


@cache
def _cosines() -> NDArray[np.float64]:
    """(KEPT, SIDE): the lowest rows of the orthonormal discrete cosine transform."""
    frequencies, places = np.arange(KEPT)[:, None], np.arange(SIDE) + 0.5
    waves = np.cos(np.pi / SIDE * frequencies * places) * np.sqrt(2 / SIDE)
    waves[0] = np.sqrt(1 / SIDE)
    return waves


def find_duplicates(hashes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of each shard whose hash occurred before, in an earlier row or shard. Only equal hashes count."""
    flat = np.array([value for shard in hashes for value in shard], dtype=np.uint64)
    later = np.ones(len(flat), dtype=bool)
    later[np.unique(flat, return_index=True)[1]] = False
    ends = np.cumsum([len(shard) for shard in hashes])
    return [np.flatnonzero(part).tolist() for part in np.split(later, ends[:-1])] if len(hashes) else []
