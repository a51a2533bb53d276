"""Tar shards as img2dataset and webdataset write them: pictures with ``.json`` or ``.txt`` beside them, read by index.

webdataset streams shards and cannot say where it stopped. Here every shard gets an index of its members' places once, so any
sample can be read alone, the order of a run is a function of its seed, and a run continues at any sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .source import Example, UnreadableExample, crop_to_square

PICTURES = ("jpg", "jpeg", "png", "webp")
#: Pictures of more pixels are refused before they are decoded (a decompression bomb is a few kilobytes).
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie.

    Attributes:
        url: of the shard.
        keys: names of its N samples.
        places: (N, 6) int64: offset and size of picture, JSON and text; size 0 where there is none.
    """

    url: str
    keys: list[str]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def index_shard(url: str, cache: Path | None = None) -> ShardIndex:
    """The index of a shard; read from ``cache`` if it was made for the same file, else made and kept there.

    Raises:
        UserError: the shard cannot be read or is not a tar file.
    """
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(url)
        about = filesystem.info(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"shard {url} cannot be opened ({error}); check the path and the file system's package") from None
    stamp = json.dumps([url, about.get("size"), str(about.get("mtime") or about.get("ETag") or about.get("LastModified"))])
    kept = cache / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.npz" if cache else None
    if kept is not None and kept.is_file():
        with np.load(kept, allow_pickle=False) as content:
            return ShardIndex(url, [str(k) for k in content["keys"]], content["places"])
    samples: dict[str, list[int]] = {}
    end = 0
    try:
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                column = 0 if ending.lower() in PICTURES else {"json": 2, "txt": 4}.get(ending.lower())
                if member.isfile() and column is not None:
                    row = samples.setdefault(f"{folder}/{stem}" if folder else stem, [0] * 6)
                    row[column : column + 2] = [member.offset_data, member.size]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"shard {url} is not a whole tar file ({error}); write or download it again") from None
    # A tar file ends with a block of zeros behind the last member, which fills its last block of 512 bytes.
    if about.get("size") is not None and about["size"] < -(-end // 512) * 512 + 512:
        raise UserError(f"shard {url} is not a whole tar file (its end is cut off); write or download it again")
    samples = {key: row for key, row in samples.items() if row[1]}
    index = ShardIndex(url, list(samples), np.array(list(samples.values()), dtype=np.int64).reshape(-1, 6))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, keys=np.array(index.keys, dtype=str), places=index.places)
        os.replace(partial, kept)
    return index


def expand_urls(patterns: str | Sequence[str]) -> list[str]:
    """Shard URLs for patterns with braces (``{00000..00099}``, ``{a,b}``) and, for anything fsspec lists, ``*``.

    Raises:
        UserError: a pattern that matches nothing.
    """
    import fsspec
    from webdataset.shardlists import expand_urls as expand_braces

    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = []
        for url in expand_braces(pattern):
            if "*" in url or "?" in url:
                filesystem, path = fsspec.url_to_fs(url)
                found += [filesystem.unstrip_protocol(p) if "://" in url else str(p) for p in sorted(filesystem.glob(path))]
            else:
                found.append(url)
        if not found:
            raise UserError(f"{pattern} matches no shard; give tar files, such as /data/{{00000..00099}}.tar or /data/*.tar")
        urls += found
    return urls


class ShardSource:
    """Samples of tar shards.

    Args:
        urls: patterns of the shards (see ``expand_urls``).
        size: side of the pictures; they are resized so that the shorter side fits and cropped to the centre square.
        captions: JSON fields that hold captions, with the weight by which one is drawn; ``"txt"`` is the text file.
        min_side: smaller pictures are unreadable examples.
        max_aspect: so are pictures whose sides differ by more than this factor.
        min_scores: JSON fields with the least value that is taken; lower ones are unreadable examples, as is a missing field.
        max_caption: captions are cut to so many characters; empty ones are unreadable examples.
        validation_shards: the last so many shards are kept for validation.
        cache: folder of the indices; beside the shards (``.index``) for local ones if None.
        held_out: give the validation shards.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        size: int = 512,
        captions: Mapping[str, float] | None = None,
        min_side: int = 0,
        max_aspect: float = 0.0,
        min_scores: Mapping[str, float] | None = None,
        max_caption: int = 1000,
        validation_shards: int = 1,
        cache: Path | None = None,
        held_out: bool = False,
    ) -> None:
        self._arguments: dict[str, Any] = dict(
            urls=urls, size=size, captions=captions, min_side=min_side, max_aspect=max_aspect, min_scores=min_scores,
            max_caption=max_caption, validation_shards=validation_shards, cache=cache,
        )  # fmt: skip
        self.size, self.fields = size, dict(captions or {"txt": 1.0})
        self.min_side, self.max_aspect, self.min_scores = min_side, max_aspect, dict(min_scores or {})
        self.max_caption = max_caption
        found = expand_urls(urls)
        if len(found) <= validation_shards:
            raise UserError(f"{urls} matches {len(found)} shards; more than the {validation_shards} kept for validation are needed")
        chosen = found[-validation_shards:] if held_out else found[: len(found) - validation_shards]
        bar = tqdm(chosen, desc="indexing shards", mininterval=2, disable=len(chosen) < 20)
        self.shards = [index_shard(url, cache or _beside(url)) for url in bar]
        #: Samples of each shard: the order of a run keeps neighbours together (see ``draw_indices``).
        self.shard_sizes = [len(shard) for shard in self.shards]
        self._starts = [0, *accumulate(self.shard_sizes)]
        if not self._starts[-1]:
            raise UserError(f"{urls}: no shard holds a picture ({', '.join(PICTURES)}); is it a shard of another kind?")

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        """The name by which messages call an example: shard and key."""
        shard, row = self._place(index)
        return f"{shard.url}:{shard.keys[row]}"

    def caption(self, index: int) -> str:
        """The heaviest caption of an example."""
        captions = self._captions(*self._texts(index), index)
        return max(captions, key=lambda pair: pair[1])[0]

    def __getitem__(self, index: int) -> Example:
        facts, text = self._texts(index)
        for name, least in self.min_scores.items():
            value = facts.get(name)
            if not isinstance(value, int | float) or not value >= least:
                raise UnreadableExample(self.key(index), f"{name} is {value}, below {least}")
        captions = self._captions(facts, text, index)
        shard, row = self._place(index)
        content = self._bytes(shard, row, 0)
        try:
            with Image.open(io.BytesIO(content)) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise UnreadableExample(self.key(index), f"{file.width}x{file.height} is more than {MOST_PIXELS:,} pixels")
                short, long = sorted(file.size)
                if short < max(1, self.min_side) or (self.max_aspect and long > self.max_aspect * short):
                    raise UnreadableExample(self.key(index), f"{file.width}x{file.height} is outside min_side or max_aspect")
                picture = crop_to_square(file.convert("RGB"), self.size)
        except UnreadableExample:
            raise
        except Exception as error:  # PIL's decoders raise almost anything on damaged files
            raise UnreadableExample(self.key(index), f"{type(error).__name__}: {error}") from None
        texts, weights = zip(*captions, strict=True)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return Example(texts[0], pixels, captions=texts, caption_weights=weights)

    @property
    def validation(self) -> ShardSource:
        """The shards kept for validation."""
        return self._validation

    @cached_property
    def _validation(self) -> ShardSource:
        return ShardSource(**self._arguments, held_out=True)

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        shard = bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]

    def _bytes(self, shard: ShardIndex, row: int, column: int) -> bytes:
        offset, size = (int(n) for n in shard.places[row, column : column + 2])
        if not size:
            return b""
        file = _open(shard.url, os.getpid())
        file.seek(offset)
        return file.read(size)

    def _texts(self, index: int) -> tuple[dict[str, Any], str]:
        shard, row = self._place(index)
        try:
            facts = json.loads(self._bytes(shard, row, 2) or b"{}")
            text = self._bytes(shard, row, 4).decode("utf-8")
        except ValueError as error:
            raise UnreadableExample(self.key(index), f"its JSON or text is damaged ({error})") from None
        return facts if isinstance(facts, dict) else {}, text

    def _captions(self, facts: Mapping[str, Any], text: str, index: int) -> list[tuple[str, float]]:
        found = []
        for field, weight in self.fields.items():
            caption = text if field == "txt" else facts.get(field)
            if isinstance(caption, str) and caption.strip():
                found.append((caption.strip()[: self.max_caption], weight))
        if not found:
            has = ", ".join(sorted(facts)) or "nothing"
            raise UnreadableExample(self.key(index), f"no caption in {', '.join(self.fields)}; its JSON has {has}")
        return found


@lru_cache(maxsize=64)
def _open(url: str, process: int) -> Any:
    """An open shard. Data workers are processes that share their parent's files, so each opens its own."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.open(path, "rb")


def _beside(url: str) -> Path | None:
    folder = Path(url).parent
    return folder / ".index" if folder.is_dir() and os.access(folder, os.W_OK) else None
