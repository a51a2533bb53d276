"""The English prompt, encoded for the backbone the way the official inference does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .chunks import ChunkLayout, tokenize

#: The official script's limit, shared by both languages.
MAX_CHUNKS = 5


@torch.no_grad()
def encode_english(prompts: Sequence[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """Last hidden states of CLIP's text encoder, with A1111 emphasis.

    Chunks of 75 tokens plus markers, padded by the end of text, no mask. Features are multiplied by the bracket weights,
    then rescaled so that their mean stays what it was.

    Returns:
        (B, L, D) in the encoder's dtype; L is 77 for prompts that fit one chunk. Every prompt is padded to the longest.
    """
    layout = ChunkLayout.of(tokenizer, tokenizer.model_max_length - 2, MAX_CHUNKS)
    tokens = tokenize(prompts, tokenizer, layout)
    batch, chunks, length = tokens.ids.shape
    features = text_encoder(tokens.ids.view(batch * chunks, length).to(text_encoder.device)).last_hidden_state
    features = features.view(batch, chunks, length, -1)
    if (tokens.weights != 1).any():
        weights = tokens.weights.to(features)[..., None]
        dims = (2, 3)
        before = features.mean(dims, keepdim=True)
        features = features * weights
        after = features.mean(dims, keepdim=True)
        features = features * (before / after)
    return layout.join(features)
