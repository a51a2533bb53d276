"""Perceptual hashes beside SciPy's transform."""

import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn

from bdm.prepare.hashing import KEPT, SIDE, perceptual_hash


def by_scipy(pixels):
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    grey = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = np.asarray(dctn(grey, norm="ortho"))[:KEPT, :KEPT].flatten()
    return sum(1 << (KEPT * KEPT - 1 - i) for i, value in enumerate(low) if value > np.median(low[1:]))


def test_hashes_are_those_of_scipys_cosine_transform():
    for side in (7, 32, 61):
        pixels = torch.randint(0, 256, (3, side, side + 3), dtype=torch.uint8)
        assert perceptual_hash(pixels) == by_scipy(pixels)


def test_a_plain_picture_has_no_frequency_whatever_its_brightness():
    hashes = {perceptual_hash(torch.full((3, 40, 40), level, dtype=torch.uint8)) for level in (1, 77, 200)}
    assert hashes == {1 << (KEPT * KEPT - 1)}
