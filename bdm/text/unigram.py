"""A fast tokenizer of unigram pieces (SentencePiece's kind) from plain lists, with no model file of it.

Kudo, "Subword Regularization" (arXiv 1804.10959): of all ways to cut a text into pieces, that with the
largest product of probabilities is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: A character that a vocabulary's map must take away, and that belongs to no other: see ``_normalizer``.
NOTHING = "\x01"
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """Pieces and what is done to a text before it is cut into them.

    Attributes:
        pieces: (piece, score) by id; the score is the logarithm of its probability.
        begin: id in front of every text.
        end: id behind it.
        pad: id that fills the rest.
        unknown: id of what is no piece.
        characters: what stands for a character; characters that are not in it stay.
    """

    pieces: list[tuple[str, float]]
    begin: int
    end: int
    pad: int
    unknown: int
    characters: Mapping[str, str]


def unigram_tokenizer(vocabulary: Vocabulary, positions: int) -> Any:
    """transformers' fast tokenizer: the marker in front, a text's pieces, the marker behind.

    Every character is replaced by the map, runs of blanks become one, words begin with a blank. A text of no
    characters has no tokens, and characters side by side that are no pieces are one unknown token, as in
    XLM-R's own tokenizer. What looks like a marker (``</s>``) in a text is a piece like any other.

    Args:
        vocabulary: its map must take ``NOTHING`` away.
        positions: of the text encoder.

    Returns:
        A ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end, pad, unknown = (
        vocabulary.pieces[i][0]
        for i in (vocabulary.begin, vocabulary.end, vocabulary.pad, vocabulary.unknown)
    )
    cut: Any = Tokenizer(models.Unigram(vocabulary.pieces, vocabulary.unknown, False))
    cut.normalizer = _normalizer(vocabulary.characters)
    cut.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")
    cut.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    cut.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(begin, vocabulary.begin), (end, vocabulary.end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=cut,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=positions,
        split_special_tokens=True,
    )


def _normalizer(characters: Mapping[str, str]) -> Any:
    """What tokenizers do to a text first: every character by the map, then runs of blanks into one.

    tokenizers' ``Precompiled`` looks a short cluster (a letter with its accent) up as a whole and takes what
    it finds for the first character in place of all of it. So characters are parted before it, by one that
    belongs to no cluster and that the map takes away again. Those of ASCII are part of none but a line's end.
    """
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"(?<=[\s\S])(?=[^\x00-\x7f])"), NOTHING),
            normalizers.Precompiled(_compile(characters)),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )


def _compile(characters: Mapping[str, str]) -> bytes:
    """A map of characters in SentencePiece's form (``precompiled_charsmap``): a double array, then the texts.

    A unit of the array says which byte leads to it, where the bytes behind it lie (the exclusive or of that
    place and its own), and whether a key ends there; then the first of them holds the key's value, the place
    of its text. Every node that is no end has 256 units for itself here: larger than need be, and simple.
    """
    texts, values = bytearray(), {}
    for text in dict.fromkeys(characters.values()):
        values[text] = len(texts)
        texts += text.encode() + b"\0"
    keys = {key.encode(): values[text] for key, text in characters.items()}
    nodes = sorted({key[:i] for key in keys for i in range(len(key))}, key=lambda node: (len(node), node))
    # The first unit is the root, which no byte leads to.
    base = {node: 256 * (1 + i) for i, node in enumerate(nodes)}
    first_value = 256 * (1 + len(nodes))
    units = np.zeros(first_value + 256 * (1 + len(keys) // 256), np.uint32)
    units[0] = _unit(0, base[b""], 0, False)
    for node in nodes[1:]:
        place = base[node[:-1]] ^ node[-1]
        units[place] = _unit(place, base[node], node[-1], False)
    for i, (key, value) in enumerate(keys.items()):
        place = base[key[:-1]] ^ key[-1]
        units[place] = _unit(place, first_value + i, key[-1], True)
        units[first_value + i] = value | 1 << 31
    return struct.pack("<I", units.nbytes) + units.tobytes() + bytes(texts)


def _unit(place: int, following: int, byte: int, ends: bool) -> int:
    """A unit of the double array: its byte, a flag where a key ends, the way to the bytes that follow."""
    way = place ^ following
    assert way < 1 << 21, "larger ones are written in another way"
    return byte | ends << 8 | way << 10
