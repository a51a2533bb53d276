"""What preparing costs and what came out of it: disk, near-duplicates, scores, counts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from ..data.prepared import DUPLICATES
from ..extras import require_packages
from ..files import write_json
from .hashing import find_duplicates
from .shard import Encoders, ShardSettings


def disk_cost(encoders: Encoders, settings: ShardSettings, size: int, count: int, out: Path) -> str:
    """What a sample takes on disk, for each choice of ``text``.

    Args:
        encoders: the models.
        settings: of the shards.
        size: side of square pictures.
        count: samples in all.
        out: folder of the shards.
    """
    width, height = settings.buckets[len(settings.buckets) // 2] if settings.buckets else (size, size)
    shrink = 2 ** (len(encoders.vae.config["block_out_channels"]) - 1)
    moments = (
        2
        * encoders.vae.config["latent_channels"]
        * (width // shrink)
        * (height // shrink)
        * settings.dtype.itemsize
    )
    parts = [f"moments {moments:,} bytes"]
    if encoders.native is not None:
        layout = encoders.native.layout
        features = layout.length * encoders.native.text_dim * settings.dtype.itemsize
        parts.append(f"a caption's features {features:,} bytes a chunk (text: features)")
        parts.append(f"or its token ids up to {4 * layout.content:,} bytes a chunk (text: ids)")
    free = shutil.disk_usage(out).free / 1e9
    return (
        f"a sample takes {', '.join(parts)}; {count:,} samples, text: {settings.text}; {free:,.0f} GB are"
        " free"
    )


def finish_folder(
    out: Path,
    tables: dict[Path, dict[str, Any]],
    samples: int,
    new: int,
    seconds: float,
    min_score: float | None,
) -> dict[str, Any]:
    """Mark the near-duplicates, draw the scores and write the report.

    Args:
        out: folder of the shards.
        tables: of all shards, by their tar files.
        samples: of the raw data.
        new: how many of them this run dealt with.
        seconds: how long it took.
        min_score: the threshold that was used.
    """
    left_out: Counter[str] = Counter()
    for table in tables.values():
        left_out.update(table["left_out"])
    with open(out / "unusable.jsonl", "w", encoding="utf-8") as file:
        for key, reason in (pair for table in tables.values() for pair in table["unusable"]):
            file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
    if scores := [score for table in tables.values() for score in table["seen_scores"]]:
        draw_scores(scores, min_score, out / "scores.png")
    rows = _duplicate_rows(tables)
    report = {
        "samples": samples,
        "kept": sum(len(table["places"]) for table in tables.values()),
        "left_out": dict(sorted(left_out.items())),
        "near_duplicates": sum(map(len, rows.values())),
        "shards": len(tables),
        "gigabytes": round(sum(table["size"] for table in tables.values()) / 1e9, 6),
        "prepared_now": new,
        "seconds": round(seconds, 1),
        "samples_per_second": round(new / seconds, 1),
    }
    write_json(out / "report.json", report)
    compared = (
        "64-bit DCT hashes of the cut pictures; equal ones are near-duplicates, the first is not listed"
    )
    # Last, because sources take a folder without it for unfinished.
    write_json(out / DUPLICATES, {"compared": compared, "rows": rows}, indent=None)
    return report


def _duplicate_rows(tables: dict[Path, dict[str, Any]]) -> dict[str, list[int]]:
    """By shard, the rows whose hash occurred before.

    Training and validation shards are not compared with each other.
    """
    rows: dict[str, list[int]] = {}
    for split in sorted({path.name.rpartition("-")[0] for path in tables}):
        own = {
            path.name: table["hashes"]
            for path, table in tables.items()
            if path.name.rpartition("-")[0] == split
        }
        rows |= {
            name: later for name, later in zip(own, find_duplicates(list(own.values())), strict=True) if later
        }
    return rows


def describe_report(report: dict[str, Any], out: Path) -> str:
    """The report as a paragraph."""
    reasons = ", ".join(f"{count:,} {name}" for name, count in report["left_out"].items()) or "none"
    return (
        f"{out}: {report['kept']:,} of {report['samples']:,} samples kept in {report['shards']} shards,"
        f" {report['gigabytes']:,.3f} GB; left out: {reasons}; {report['near_duplicates']:,} near-duplicates"
        f" are marked; {report['prepared_now']:,} samples in {report['seconds']:,.0f} s,"
        f" {report['samples_per_second']:,.1f} samples/s"
    )


def draw_scores(scores: list[float], threshold: float | None, path: Path) -> None:
    """A histogram of the scores with the share that every threshold would keep."""
    import numpy as np

    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(scores, bins=60, color="tab:blue", alpha=0.7)
    axes.set(xlabel="Chinese CLIP score of picture and caption", ylabel="samples")
    share = axes.twinx()
    ordered = np.sort(scores)
    share.plot(ordered, 100 * (1 - np.arange(len(ordered)) / len(ordered)), color="black", linewidth=1)
    share.set(ylabel="% kept by min_score", ylim=(0, 100))
    if threshold is not None:
        axes.axvline(threshold, color="tab:red")
    figure.savefig(path, dpi=110)
