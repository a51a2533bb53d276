"""Perceptual hashes beside the transform's own sum."""

import math

import numpy as np
import torch
from PIL import Image

from bdm.prepare.hashing import KEPT, SIDE, perceptual_hash


def by_definition(pixels):
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    grey = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    places = (np.arange(SIDE) + 0.5) * math.pi / SIDE
    low = [
        (grey * np.outer(np.cos(row * places), np.cos(column * places))).sum()
        * math.sqrt((1 if row else 0.5) * (1 if column else 0.5))
        for row in range(KEPT)
        for column in range(KEPT)
    ]
    return int("".join(str(int(value > np.median(low[1:]))) for value in low), 2)


def test_hashes_are_those_of_the_cosine_transform():
    for side in (7, 32, 61):
        pixels = torch.randint(0, 256, (3, side, side + 3), dtype=torch.uint8)
        assert perceptual_hash(pixels) == by_definition(pixels)


def test_a_plain_picture_has_no_frequency_whatever_its_brightness():
    hashes = {perceptual_hash(torch.full((3, 40, 40), level, dtype=torch.uint8)) for level in (1, 77, 200)}
    assert hashes == {1 << (KEPT * KEPT - 1)}
