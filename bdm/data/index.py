"""One index a corpus: arrays on disk that all processes of a machine map, 24 bytes a sample.

``bdm index`` makes it. Its folder holds ``index.json``: what was decided, and the fingerprint of all that
decides the order. In a folder of that name are ``samples.npy`` (a ``SAMPLE`` for each sample that is used,
shard by shard), ``shards.npy`` (a ``SHARD`` for each shard, in which every sample's fate is counted),
``names.npy`` and ``buckets.npy`` (samples of each bucket in each shard).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_json

FORMAT = 1
#: Why samples are left out, in the order of ``SHARD``'s columns.
REASONS = ("duplicate", "unreadable", "caption", "score", "size")
#: A sample: the place of its members in the shard (of a row in a row group: its number, and 0), width and
#: height, number of the bucket, and the CRC-32 of its key, by which a reader knows it again.
SAMPLE = np.dtype(
    [
        ("place", "<u8"),
        ("length", "<u4"),
        ("key", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("bucket", "<i2"),
        ("spare", "<u2"),
    ]
)
#: A shard: number of its first sample, samples, bytes, row group (-1: the whole file), CRC-32 of the file
#: (0: not known), digest of its samples, CRC-32 of the file's size and time, and how many samples were left
#: out for each reason.
SHARD = np.dtype(
    [
        ("start", "<i8"),
        ("count", "<i8"),
        ("bytes", "<i8"),
        ("group", "<i4"),
        ("crc", "<u4"),
        ("digest", "<u8"),
        ("stamp", "<u4"),
        *((f"without_{reason}", "<i4") for reason in REASONS),
    ]
)


@dataclass(frozen=True)
class CorpusIndex:
    """An index as it lies on disk.

    Attributes:
        folder: where.
        about: what ``index.json`` says.
        samples: (N,) of ``SAMPLE``, mapped.
        shards: (S,) of ``SHARD``.
        names: (S,) bytes: of each file the number of its pattern, and its way from the pattern's folder.
        buckets: (S, K) samples of each bucket in each shard.
    """

    folder: Path
    about: Mapping[str, Any]
    samples: np.ndarray
    shards: np.ndarray
    names: np.ndarray
    buckets: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Of the samples, their order and what decides it; not of where the files are."""
        return self.about["fingerprint"]

    def name(self, shard: int) -> str:
        """Name of a shard's file, and of its row group."""
        name = self.names[shard].decode("utf-8", "surrogateescape").partition("/")[2]
        group = int(self.shards["group"][shard])
        return name if group < 0 else f"{name}:{group}"


def fingerprint(shards: np.ndarray, rules: Mapping[str, Any]) -> str:
    """What changes when the samples of a corpus, or their order, do."""
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(shards["count"]).tobytes())
    digest.update(np.ascontiguousarray(shards["digest"]).tobytes())
    return digest.hexdigest()[:16]


def digest_of(samples: np.ndarray) -> int:
    """Of a shard's samples: which they are and where they lie."""
    digest = hashlib.sha256()
    for name in ("place", "length", "key"):
        digest.update(np.ascontiguousarray(samples[name]).tobytes())
    return int.from_bytes(digest.digest()[:8])


def read_index(folder: Path) -> CorpusIndex:
    """Open an index; its samples stay on disk.

    Raises:
        UserError: there is none, or it is not whole.
    """
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')}, this version reads {FORMAT}")
        inside = folder / about["fingerprint"]
        samples = np.load(inside / "samples.npy", mmap_mode="r")
        shards, names, buckets = (np.load(inside / f"{n}.npy") for n in ("shards", "names", "buckets"))
        if (samples.dtype, shards.dtype) != (SAMPLE, SHARD) or len(samples) != int(shards["count"].sum()):
            raise ValueError("its arrays do not fit together")
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"{folder} holds no whole index ({error}); make it with: bdm index CONFIG.yaml"
        ) from None
    return CorpusIndex(folder, about, samples, shards, names, buckets)


def keep_history(index: CorpusIndex) -> None:
    """Keep what a later index is compared with: names, sizes and digests of the shards, by fingerprint."""
    folder = index.folder / "history"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(
        folder / f"{index.fingerprint}.npz",
        names=np.array([index.name(i) for i in range(len(index.shards))], dtype=str),
        counts=index.shards["count"],
        digests=index.shards["digest"],
    )
    write_json(folder / f"{index.fingerprint}.json", dict(index.about))


def differences(folder: Path, before: str, now: str) -> list[str]:
    """What changed from one corpus of an index's history to another; empty where one is not known.

    Args:
        folder: of the index.
        before: fingerprint.
        now: fingerprint.
    """
    try:
        rules = [
            json.loads((folder / "history" / f"{name}.json").read_text(encoding="utf-8"))["rules"]
            for name in (before, now)
        ]
        old, new = (_read_history(folder / "history" / f"{name}.npz") for name in (before, now))
    except (OSError, ValueError, KeyError):
        return []
    lines = [f"{k}: {rules[0].get(k)} -> {v}" for k, v in rules[1].items() if rules[0].get(k) != v]
    for what, names in (
        ("gone", [n for n in old if n not in new]),
        ("new", [n for n in new if n not in old]),
        ("changed", [n for n in new if n in old and new[n] != old[n]]),
    ):
        if names:
            lines.append(f"{len(names)} shards {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})")
    if not lines and list(old) != list(new):
        lines.append("the shards come in another order")
    return lines


def _read_history(path: Path) -> dict[str, tuple[int, int]]:
    with np.load(path, allow_pickle=False) as content:
        pairs = zip(content["counts"].tolist(), content["digests"].tolist(), strict=True)
        return dict(zip(content["names"].tolist(), pairs, strict=True))
