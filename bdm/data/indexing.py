"""Making an index: shards are scanned in any order by any number of processes, then joined.

What was scanned stays in ``making/`` until the whole is there, so work that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from ..files import append_line, atomic_write, write_json, writing_to
from .index import (
    FORMAT,
    REASONS,
    SAMPLE,
    SHARD,
    CorpusIndex,
    differences,
    fingerprint,
    keep_history,
    read_index,
)
from .parquet import columns_of, groups_of
from .pictures import PictureRules
from .reading import NotWhole, locate, stamp
from .scanning import Scanned, scan_row_group, scan_tar_shard
from .shards import expand_urls

#: Files that are scanned before what was found is kept.
TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is indexed.

    Attributes:
        kind: of its files.
        urls: patterns of the files (see ``expand_urls``).
        rules: which samples are used.
        picture: column of the pictures, in parquet files.
    """

    kind: Literal["shards", "parquet"]
    urls: tuple[str, ...]
    rules: PictureRules
    picture: str = "image"

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides which samples are used, and in which bucket each is."""
        names = ("captions", "min_side", "max_aspect", "min_scores", "buckets")
        own = {k: v for k, v in asdict(self.rules).items() if k in names}
        rules = {"kind": self.kind, **own, "picture": self.picture if self.kind == "parquet" else None}
        return json.loads(json.dumps(rules))


class Maker:
    """Makes the index of a corpus.

    Args:
        corpus: what is indexed.
        folder: of the index.
        shard_limit: share of the shards that may not be whole.
        sample_limit: share of the samples that may be damaged or without a caption.
    """

    def __init__(
        self, corpus: Corpus, folder: Path, shard_limit: float = 0.05, sample_limit: float = 0.05
    ) -> None:
        self.corpus, self.folder, self.making = corpus, folder, folder / "making"
        self.shard_limit, self.sample_limit = shard_limit, sample_limit

    def begin(self) -> list[str]:
        """List the files, once for all processes. What was scanned of others before is thrown away.

        Raises:
            UserError: there are none, or the folder cannot be written.
        """
        urls = expand_urls(self.corpus.urls)
        plan = {"urls": urls, "rules": self.corpus.decisive}
        with writing_to(self.folder, "nothing was changed"):
            if _read_json(self.making / "plan.json") != plan:
                shutil.rmtree(self.making, ignore_errors=True)
                self.making.mkdir(parents=True)
                write_json(self.making / "plan.json", plan, indent=None)
        return urls

    def urls(self) -> list[str]:
        """The files that ``begin`` listed."""
        plan = _read_json(self.making / "plan.json")
        if plan is None:
            raise UserError(f"{self.making} is gone; run the same command again")
        return plan["urls"]

    def tasks(self) -> list[int]:
        """Numbers of the tasks that are not done."""
        count = -(-len(self.urls()) // TOGETHER)
        return [number for number in range(count) if not self._part(number).exists()]

    def run(self, task: int) -> int:
        """Scan the files of a task and keep what was found; gives how many they were."""
        own = self.urls()[task * TOGETHER : (task + 1) * TOGETHER]
        found: list[tuple[str, Scanned]] = []
        bad: list[tuple[str, str]] = []
        for url in own:
            try:
                found += [(url, scanned) for scanned in self._scan(url)]
            except NotWhole as error:
                bad.append((url, str(error)))
        self._keep(task, found, bad)
        return len(own)

    def _scan(self, url: str) -> list[Scanned]:
        rules = self.corpus.rules
        if self.corpus.kind == "shards":
            mark = zlib.crc32(json.dumps(stamp(url, locate(url)[2])).encode())
            scanned = self._known(url, mark) or scan_tar_shard(url, rules)
            scanned.row["stamp"] = mark
            return [scanned]
        columns = columns_of(self.corpus.picture, rules)
        return [
            scan_row_group(url, group, columns, rules) for group in range(len(groups_of(url, columns)[1]))
        ]

    def _known(self, url: str, mark: int) -> Scanned | None:
        """What the last index says of a file that has not changed."""
        if self._last is None:
            return None
        index, rows = self._last
        row = rows.get(relative(url, self._roots))
        if row is None or int(index.shards["stamp"][row]) != mark:
            return None
        about = index.shards[row]
        samples = index.samples[about["start"] : about["start"] + about["count"]]
        return Scanned(np.array(samples), about.copy(), index.buckets[row])

    @cached_property
    def _roots(self) -> tuple[str, ...]:
        return tuple(root_of(pattern) for pattern in self.corpus.urls)

    @cached_property
    def _last(self) -> tuple[CorpusIndex, dict[bytes, int]] | None:
        """The last index, if it was made by the same rules, and the rows of its files."""
        try:
            index = read_index(self.folder)
        except UserError:
            return None
        if index.about["rules"] != self.corpus.decisive:
            return None
        return index, {name: row for row, name in enumerate(index.names.tolist())}

    def _part(self, task: int) -> Path:
        return self.making / f"{task:06d}.npz"

    def _keep(self, task: int, found: list[tuple[str, Scanned]], bad: list[tuple[str, str]]) -> None:
        kinds = max(1, len(self.corpus.rules.buckets))
        scanned = [one for _, one in found]
        named = [[url, *pair] for url, one in found for pair in one.named]
        arrays = {
            "samples": np.concatenate([np.zeros(0, SAMPLE), *(one.samples for one in scanned)]),
            "shards": np.array([one.row for one in scanned], dtype=SHARD),
            "buckets": np.array([one.buckets for one in scanned], dtype=np.int64).reshape(-1, kinds),
            "said": np.array(json.dumps({"urls": [url for url, _ in found], "bad": bad, "named": named})),
        }
        path = self._part(task)
        with (
            writing_to(path, "what was scanned stays"),
            atomic_write(path, shared=True) as partial,
            open(partial, "wb") as file,
        ):
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    def finish(self) -> tuple[CorpusIndex, list[str]]:
        """Join what was scanned; gives the index and what changed since the last one.

        Raises:
            UserError: something is missing, or too much is of no use.
        """
        urls = self.urls()
        count = -(-len(urls) // TOGETHER)
        if missing := self.tasks():
            raise UserError(f"{len(missing)} of {count} parts are missing; run the same command again")
        shards, names, buckets, said = self._join_shards(count)
        self._refuse_useless(len(urls), shards, said)
        mark = fingerprint(shards, self.corpus.decisive)
        before = _read_json(self.folder / "index.json")
        with writing_to(self.folder, "the last index stays"):
            self._write(mark, count, shards, names, buckets)
            self._publish(mark, urls, said)
        index = read_index(self.folder)
        keep_history(index)
        shutil.rmtree(self.making, ignore_errors=True)
        old = before["fingerprint"] if before else mark
        return index, differences(self.folder, old, mark) if old != mark else []

    def _parts(self, count: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        for task in range(count):
            with np.load(self._part(task), allow_pickle=False) as content:
                yield content, json.loads(str(content["said"]))

    def _join_shards(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, list[Any]]]:
        shards, buckets, names = [], [], []
        said: dict[str, list[Any]] = {"bad": [], "named": []}
        for content, own in self._parts(count):
            shards.append(content["shards"])
            buckets.append(content["buckets"])
            names += own["urls"]
            for what, kept in said.items():
                kept += own[what]
        whole = np.concatenate(shards)
        whole["start"] = np.cumsum(whole["count"]) - whole["count"]
        relatives = np.array([relative(name, self._roots) for name in names], dtype=bytes)
        return whole, relatives, np.concatenate(buckets), said

    def _refuse_useless(self, files: int, shards: np.ndarray, said: dict[str, list[Any]]) -> None:
        bad, used = said["bad"], int(shards["count"].sum())
        if len(bad) > max(1, self.shard_limit * files):
            raise UserError(
                f"{len(bad)} of {files} shards are not whole; the last: {bad[-1][1]}; allowed is a share of"
                f" {self.shard_limit:g} (data.shard_limit)"
            )
        lost = {reason: int(shards[f"without_{reason}"].sum()) for reason in REASONS}
        faults = lost["unreadable"] + lost["caption"]
        if not used or faults > self.sample_limit * max(200, used):
            counted = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count) or "none"
            raise UserError(
                f"{used} samples are of use, and these are not: {counted}; captions are looked for in"
                f" {', '.join(self.corpus.rules.captions)}; of damage and missing captions a share of"
                f" {self.sample_limit:g} is allowed (unreadable_limit); such as"
                f" {said['named'][-1] if said['named'] else 'none'}"
            )

    def _write(
        self, mark: str, count: int, shards: np.ndarray, names: np.ndarray, buckets: np.ndarray
    ) -> None:
        """Write the arrays into a folder of their own; the samples part by part."""
        with atomic_write(self.folder / mark) as partial:
            partial.mkdir()
            for name, array in (("shards", shards), ("names", names), ("buckets", buckets)):
                np.save(partial / f"{name}.npy", array)
            total = int(shards["count"].sum())
            samples = np.lib.format.open_memmap(partial / "samples.npy", "w+", SAMPLE, (total,))
            place = 0
            for content, _ in self._parts(count):
                own = content["samples"]
                samples[place : place + len(own)] = own
                place += len(own)
            samples.flush()

    def _publish(self, mark: str, urls: list[str], said: dict[str, list[Any]]) -> None:
        """Let the index be the new one, whole or not at all."""
        left_out = self.folder / "left_out.jsonl"
        left_out.unlink(missing_ok=True)
        for url, reason in said["bad"]:
            append_line(left_out, {"shard": url, "reason": reason})
        for url, key, reason in said["named"]:
            append_line(left_out, {"key": f"{url}:{key}", "reason": reason})
        about = {
            "format": FORMAT,
            "fingerprint": mark,
            "kind": self.corpus.kind,
            "urls": list(self.corpus.urls),
            "rules": self.corpus.decisive,
            "files": len(urls),
            "bad_shards": len(said["bad"]),
        }
        write_json(self.folder / "index.json", about)
        for other in self.folder.iterdir():
            if other.is_dir() and other.name not in (mark, "history", "making"):
                shutil.rmtree(other, ignore_errors=True)


def root_of(pattern: str) -> str:
    """The folder in front of a pattern's first wildcard or brace."""
    fixed = pattern[: min((pattern.find(c) for c in "*?{[" if c in pattern), default=len(pattern))]
    return fixed[: fixed.rfind("/") + 1]


def relative(url: str, roots: Sequence[str]) -> bytes:
    """A file's name: the number of the pattern whose folder it lies in, and its way from there."""
    for number, root in enumerate(roots):
        if url.startswith(root):
            return f"{number}/{url[len(root) :]}".encode("utf-8", "surrogateescape")
    return f"-/{url}".encode("utf-8", "surrogateescape")


def located(name: str, roots: Sequence[str]) -> str:
    """The URL of a file's name in an index."""
    number, _, rest = name.partition("/")
    return rest if number == "-" else roots[int(number)] + rest


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
