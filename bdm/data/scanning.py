"""One shard -> its part of an index: which samples are used, where they lie, and why others are not."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .buckets import nearest_bucket
from .index import REASONS, SAMPLE, SHARD, digest_of
from .members import Row, group_members
from .pictures import PictureRules, score_of
from .reading import NotWhole, ReadError, copy_file, crc_of, is_local, locate, retried
from .source import UnreadableExample

#: Names of left out samples that are kept of each shard.
NAMED = 20


@dataclass
class Scanned:
    """What a shard has.

    Attributes:
        samples: of ``SAMPLE``, those that are used.
        row: of ``SHARD``, but for its start.
        buckets: (K,) samples of each bucket.
        named: some of those that are left out, with the reason.
    """

    samples: np.ndarray
    row: np.ndarray
    buckets: np.ndarray
    named: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A sample before it is judged: key, place and length in the shard, what it says, its picture's size."""

    key: str
    place: int
    length: int
    facts: Mapping[str, Any]
    size: tuple[int, int]


def scan_tar_shard(url: str, rules: PictureRules) -> Scanned:
    """The samples of a tar file.

    Raises:
        NotWhole: it is no whole tar file, or members of one sample lie apart.
        UserError: it cannot be read.
    """
    try:
        with whole_file(url) as (path, crc):
            rows, again = retried(lambda: _read_members(url, path), url)
            size = path.stat().st_size
    except ReadError as error:
        raise UserError(f"shard {error}; start again when it can be") from None
    _refuse_apart(url, rows)
    found = [Found(k, r.begin, r.end - r.begin, r.facts(), r.size) for k, r in rows.items()]
    return judged(found, rules, size, crc, again=again)


def _read_members(url: str, path: Path) -> tuple[dict[str, Row], int]:
    try:
        with tarfile.open(path, mode="r:") as archive:
            rows, end, again = group_members(archive, measured=True, read=True)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise NotWhole(f"shard {url} is not a whole tar file ({error})") from None
    if path.stat().st_size < -(-end // 512) * 512 + 512:
        raise NotWhole(f"shard {url} is not a whole tar file (its end is cut off)")
    return rows, again


def scan_row_group(url: str, group: int, columns: tuple[str, ...], rules: PictureRules) -> Scanned:
    """The samples of a row group of a parquet file.

    Raises:
        NotWhole: its content is damaged.
        UserError: it cannot be read.
    """
    from .parquet import ParquetShard, groups_of

    rows = groups_of(url, columns)[1][group]
    shard = ParquetShard(url, group=group, rows=rows, columns=columns, measured=True)
    assert shard.sizes is not None
    try:
        found = [
            Found(f"{group}/{row}", row, 0, shard.facts(row), tuple(shard.sizes[row].tolist()))
            for row in range(rows)
        ]
    except UnreadableExample as error:
        raise NotWhole(str(error)) from None
    return judged(found, rules, 0, 0, group=group)


def judged(
    found: list[Found], rules: PictureRules, size: int, crc: int, group: int = -1, again: int = 0
) -> Scanned:
    """Decide which samples are used.

    Args:
        found: all samples of a shard.
        rules: which are used.
        size: bytes of the shard.
        crc: CRC-32 of the shard.
        group: number of the row group, or -1.
        again: samples that were left out because their key occurred before.
    """
    reasons = [reason_against(one, rules) for one in found]
    kept = [one for one, reason in zip(found, reasons, strict=True) if reason is None]
    samples = np.zeros(len(kept), dtype=SAMPLE)
    sizes = np.array([one.size for one in kept], dtype=np.int64).reshape(-1, 2)
    samples["place"], samples["length"] = [o.place for o in kept], [o.length for o in kept]
    samples["key"] = [key_check(one.key) for one in kept]
    samples["width"], samples["height"] = np.minimum(sizes, 65535).T
    samples["bucket"] = nearest_bucket(sizes, rules.buckets)
    counts = Counter(reason for reason in reasons if reason) + Counter(duplicate=again)
    row = np.zeros((), dtype=SHARD)
    row["count"], row["bytes"], row["crc"], row["group"] = len(kept), size, crc, group
    row["digest"] = digest_of(samples)
    for reason in REASONS:
        row[f"without_{reason}"] = counts[reason]
    buckets = np.bincount(samples["bucket"], minlength=max(1, len(rules.buckets)))
    named = [(one.key, reason) for one, reason in zip(found, reasons, strict=True) if reason in REASONS[:3]]
    return Scanned(samples, row, buckets, named[:NAMED])


def reason_against(one: Found, rules: PictureRules) -> str | None:
    """Why a sample is left out, a word of ``REASONS``; None where it is used."""
    if min(one.size) < 1 or one.length >= 2**32:
        return "unreadable"
    try:
        rules.captions_of(one.key, one.facts)
    except UnreadableExample:
        return "caption"
    if not all(score_of(one.facts.get(name)) >= least for name, least in rules.min_scores.items()):
        return "score"
    return None if rules.fits(*one.size) else "size"


def key_check(key: str) -> int:
    """By which a sample is known again."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape"))


def parse_sample(content: bytes, check: int) -> tuple[str, Row, bytes] | None:
    """The sample in the bytes of its members: key, what was read of it, its picture.

    None where they are of another one.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content + bytes(1536)), mode="r:") as archive:
            rows, _, _ = group_members(archive, measured=False, read=True)
    except (tarfile.TarError, EOFError, ValueError, OverflowError):
        return None
    for key, row in rows.items():
        if key_check(key) == check:
            place, size = row.members[0]
            return key, row, content[place : place + size]
    return None


@contextmanager
def whole_file(url: str) -> Iterator[tuple[Path, int]]:
    """A file on this disk, copied there while it is needed if it lies elsewhere; and its CRC-32."""
    about = locate(url)[2]
    if is_local(url):
        path = Path(url.split("://")[-1])
        yield path, crc_of(path)
        return
    with tempfile.TemporaryDirectory(prefix="bdm-index-") as folder:
        path = Path(folder) / "shard"
        yield path, copy_file(url, int(about["size"]), path)


def _refuse_apart(url: str, rows: Mapping[str, Row]) -> None:
    spans = sorted((row.begin, row.end) for row in rows.values())
    if any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise NotWhole(
            f"shard {url}: files of one sample lie apart, so it cannot be read at once; write it again with"
            " neighbours together (tar --sort=name)"
        )
