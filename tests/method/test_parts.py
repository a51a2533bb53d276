"""Which parts of a batch are negative: by the pipeline's word, its processors or its texts, not a number."""

import pytest
import torch
from diffusers.models.attention_processor import (
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from tiny import NATIVE_DIM, TEXT_DIM

from bdm.errors import UserError
from bdm.method.condition import NativeCondition
from bdm.method.parts import PartReader

N, P = "negative", "positive"
NEGATIVE, POSITIVE, CONCEPT, OTHER = torch.randn(4, 1, 5, TEXT_DIM)


def reader(samples=1, **settings):
    features = torch.randn(2, samples, 9, NATIVE_DIM)
    return PartReader(NativeCondition(features[0], features[1], **settings))


def told(unet, *texts, samples=1, **settings):
    text = torch.cat([t.expand(samples, -1, -1) for t in texts])
    return reader(samples, **settings).parts(len(text), text, unet)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ([POSITIVE], (P,)),
        ([NEGATIVE, POSITIVE], (N, P)),
        ([NEGATIVE, NEGATIVE], (N, P)),  # "" and "": the order in which all pipelines stack
        ([NEGATIVE, POSITIVE, POSITIVE], (N, P, P)),
        ([NEGATIVE, POSITIVE, CONCEPT], (N, P, N)),  # safe guidance, semantic guidance
        ([NEGATIVE, POSITIVE, CONCEPT, OTHER, CONCEPT], (N, P, N, N, N)),
        ([NEGATIVE, POSITIVE] * 3, (N, P) * 3),  # views of a panorama
        ([NEGATIVE, POSITIVE, NEGATIVE, CONCEPT], (N, P, N, P)),  # source and target of an edit
    ],
)
def test_read_off_the_texts(unet, texts, parts, samples):
    assert told(unet, *texts, samples=samples) == parts


def test_masks_of_an_edit_with_many_maps(unet):
    texts = [NEGATIVE] * 10 + [POSITIVE] * 10 + [NEGATIVE] * 10 + [CONCEPT] * 10
    assert told(unet, *texts) == (N,) * 10 + (P,) * 10 + (N,) * 10 + (P,) * 10


def test_equal_texts_of_more_than_a_pair_tell_nothing(unet):
    with pytest.raises(UserError, match="3 parts of 1 samples with the same English text"):
        told(unet, NEGATIVE, NEGATIVE, NEGATIVE)
    assert told(unet, NEGATIVE, NEGATIVE, NEGATIVE, parts=lambda: (N, P, P)) == (N, P, P)
    with pytest.raises(UserError, match="2 parts of 1 samples and the condition names 3"):
        told(unet, NEGATIVE, NEGATIVE, parts=lambda: (N, P, P))


@pytest.mark.parametrize(
    ("processor", "parts"),
    [(PAGIdentitySelfAttnProcessor2_0, (P, P)), (PAGCFGIdentitySelfAttnProcessor2_0, (N, P, P))],
)
def test_perturbed_attention_is_told_by_its_processors(unet, processor, parts):
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor()
    assert told(unet, *[NEGATIVE] * len(parts)) == parts


def test_a_part_of_a_batch_keeps_what_it_was(unet):
    """Self-attention guidance runs the UNet again on the negative half alone."""
    text = torch.cat([NEGATIVE, NEGATIVE])
    one = reader()
    assert one.parts(2, text, unet) == (N, P)
    negative, positive = text.chunk(2)
    assert one.parts(1, negative, unet) == (N,)
    assert one.parts(1, positive, unet) == (P,)
    assert one.parts(1, negative.clone(), unet) == (P,)


def test_a_text_changed_in_place_is_read_anew(unet):
    text, one = torch.cat([NEGATIVE, POSITIVE, CONCEPT]), reader()
    assert one.parts(3, text, unet) == (N, P, N)
    text[2] = text[1]
    assert one.parts(3, text, unet) == (N, P, P)
    with torch.inference_mode():
        text, one = torch.cat([NEGATIVE, POSITIVE, CONCEPT]), reader()
        assert one.parts(3, text, unet) == (N, P, N)
        text[2] = text[1]
        assert one.parts(3, text, unet) == (N, P, P)


def test_batches_that_are_not_made_of_whole_parts(unet):
    with pytest.raises(UserError, match="3 samples for 2 native prompts x 1 images"):
        reader(2).parts(3, torch.randn(3, 5, TEXT_DIM), unet)


def test_features_of_the_parts():
    positive, negative = torch.arange(2.0).view(2, 1, 1) + 1, -torch.ones(1, 1, 1)
    condition = NativeCondition(positive, negative, images_per_prompt=2)
    assert condition.features((P,)).flatten().tolist() == [1, 1, 2, 2]
    assert condition.features((N, P)).flatten().tolist() == [-1, -1, -1, -1, 1, 1, 2, 2]
    assert condition.features((P, N, P)).flatten().tolist() == [1, 1, 2, 2, -1, -1, -1, -1, 1, 1, 2, 2]
    with pytest.raises(UserError, match="no negative features"):
        NativeCondition(positive).features((N, P))
