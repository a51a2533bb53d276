"""What a SentencePiece vocabulary is, from its bytes: how many pieces, of which kind.

The file is a protocol buffer: pieces (field 1), how it was trained (2), how texts are normalized (3), and
two fields more (sentencepiece_model.proto of google/sentencepiece). What is not wholly so is no vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Fields of the whole file, and the kind of model that the trainer's field 3 tells.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_FIELDS = range(1, 6)
_KINDS = {1: "unigram", 2: "BPE", 3: "words", 4: "characters"}
#: The trainer's fields of the kind and of bytes in place of unknown characters.
_KIND, _BYTES = 3, 35
#: Bytes of the largest file that is looked into; XLM-R's has 5 million.
_LARGEST = 1 << 26


def piece_facts(path: Path) -> dict[str, str] | None:
    """What there is to say of a vocabulary; None where the file is none.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(1) != b"\x0a" or path.stat().st_size > _LARGEST:
            return None
    try:
        return _facts(path.read_bytes())
    except (ValueError, IndexError):
        return None


def _facts(data: bytes) -> dict[str, str] | None:
    pieces, trainer, normalizer = 0, {}, {}
    for field, value in _fields(data):
        if field not in _FIELDS or not isinstance(value, bytes):
            return None
        if field == _PIECE:
            if not isinstance(text := dict(_fields(value)).get(1), bytes):
                return None
            text.decode()
            pieces += 1
        elif field == _TRAINER:
            trainer = dict(_fields(value))
        elif field == _NORMALIZER:
            normalizer = dict(_fields(value))
    kind = _KINDS.get(trainer.get(_KIND, 1))  # pyright: ignore[reportArgumentType]
    name = normalizer.get(1, b"")
    if not pieces or kind is None or not isinstance(name, bytes):
        return None
    told = kind + (", with bytes for unknown characters" if trainer.get(_BYTES) == 1 else "")
    facts = {"kind": "SentencePiece vocabulary", "pieces": f"{pieces:,}", "model": told}
    return facts | ({"normalization": name.decode()} if name else {})


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbered fields of a message.

    Raises:
        ValueError: it is none.
        IndexError: it ends too early.
    """
    place = 0
    while place < len(data):
        tag, place = _number(data, place)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _number(data, place)
            yield field, value
            continue
        size, place = {1: (8, place), 5: (4, place)}.get(wire) or _length(data, place, wire)
        if place + size > len(data):
            raise ValueError("a field ends behind the message")
        yield field, data[place : place + size]
        place += size


def _length(data: bytes, place: int, wire: int) -> tuple[int, int]:
    if wire != 2:
        raise ValueError(f"there is no wire type {wire}")
    return _number(data, place)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A variable-length number, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value, place, shift = value | (byte & 0x7F) << shift, place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
