"""What preparing costs and what came out of it: disk, near-duplicates, scores, counts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.prepared import DUPLICATES
from ..extras import require_packages
from ..files import write_json
from .shard import Encoders, ShardSettings
from .tables import Totals, join_tables, write_duplicates


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
    paths: list[Path],
    samples: int,
    new: int,
    seconds: float,
    min_score: float | None,
) -> dict[str, Any]:
    """Join the tables, mark the near-duplicates, draw the scores and write the report.

    Args:
        out: folder of the shards.
        paths: of all shards.
        samples: of the raw data.
        new: how many of them this run dealt with.
        seconds: how long it took.
        min_score: the threshold that was used.
    """
    totals = Totals()
    rows = join_tables(out, paths, totals)
    if totals.scores:
        draw_scores(totals.scores, min_score, out / "scores.png")
    report = {
        "samples": samples,
        "kept": totals.kept,
        "left_out": dict(sorted(totals.left_out.items())),
        "near_duplicates": sum(map(len, rows.values())),
        "shards": totals.shards,
        "gigabytes": round(totals.size / 1e9, 6),
        "prepared_now": new,
        "seconds": round(seconds, 1),
        "samples_per_second": round(new / seconds, 1),
    }
    write_json(out / "report.json", report)
    write_duplicates(out / DUPLICATES, rows)
    return report


def describe_report(report: dict[str, Any], out: Path) -> str:
    """The report as a paragraph."""
    reasons = ", ".join(f"{count:,} {name}" for name, count in report["left_out"].items()) or "none"
    return (
        f"{out}: {report['kept']:,} of {report['samples']:,} samples kept in {report['shards']} shards,"
        f" {report['gigabytes']:,.3f} GB; left out: {reasons}; {report['near_duplicates']:,} near-duplicates"
        f" are marked; {report['prepared_now']:,} samples in {report['seconds']:,.0f} s,"
        f" {report['samples_per_second']:,.1f} samples/s"
    )


def draw_scores(scores: Mapping[float, int], threshold: float | None, path: Path) -> None:
    """A histogram of the scores with the share that every threshold would keep.

    Args:
        scores: how often each was seen.
        threshold: that was used.
        path: of the picture.
    """
    import numpy as np

    require_packages("a chart")
    from matplotlib.figure import Figure

    ordered = sorted(scores)
    counts = np.array([scores[score] for score in ordered])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(ordered, bins=60, weights=counts, color="tab:blue", alpha=0.7)
    axes.set(xlabel="Chinese CLIP score of picture and caption", ylabel="samples")
    share = axes.twinx()
    before = np.cumsum(counts) - counts
    share.plot(ordered, 100 * (1 - before / counts.sum()), color="black", linewidth=1)
    share.set(ylabel="% kept by min_score", ylim=(0, 100))
    if threshold is not None:
        axes.axvline(threshold, color="tab:red")
    figure.savefig(path, dpi=110)
