"""Tokenizers of CLIP and Chinese CLIP, with the vocabularies that pip packages carry.

No network, nothing committed.
"""

from __future__ import annotations

import gzip
from functools import cache
from typing import TYPE_CHECKING

from ..extras import package_file

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizer

#: Merges that CLIP's BPE keeps of the file: 49152 tokens less the 2 x 256 byte tokens and the two markers.
_CLIP_MERGES = 49152 - 256 - 2


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = package_file("CLIP's vocabulary", "open_clip", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : _CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(bytes_to_unicode().values())
    tokens = (
        symbols
        + [s + "</w>" for s in symbols]
        + ["".join(m) for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    return {token: i for i, token in enumerate(tokens)}, merges  # pyright: ignore[reportReturnType]


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """CLIP's BPE tokenizer (49,408 tokens) from the ``open_clip_torch`` package.

    ``length`` counts both markers.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=length)  # pyright: ignore[reportArgumentType]


def chinese_clip_tokenizer() -> BertTokenizer:
    """Chinese CLIP's BERT tokenizer (21,128 tokens, lower-casing) from the ``cn_clip`` package."""
    from transformers import BertTokenizer

    file = package_file("Chinese CLIP's vocabulary", "cn_clip", "clip/vocab.txt")
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return BertTokenizer(vocab={token: i for i, token in enumerate(lines)}, do_lower_case=True)
