"""What an index says of its corpus: counts, reasons and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require_packages
from ..files import atomic_write
from .index import REASONS, CorpusIndex

#: Samples that are looked at together.
CHUNK = 2**22
#: Edges of the histograms: the shorter side in pixels, and width to height.
SIDES = np.unique(np.round(np.geomspace(32, 8192, 65))).astype(int)
ASPECTS = np.geomspace(1 / 4, 4, 65)


def left_out(index: CorpusIndex) -> dict[str, int]:
    """How many samples are left out, by reason; those that do not occur are not named."""
    counts = {reason: int(index.shards[f"without_{reason}"].sum()) for reason in REASONS}
    return {reason: count for reason, count in counts.items() if count}


def describe(index: CorpusIndex, changes: Sequence[str]) -> str:
    """An index as a paragraph.

    Args:
        index: of the corpus.
        changes: since the last one.
    """
    gone = ", ".join(f"{count:,} {reason}" for reason, count in left_out(index).items()) or "none"
    size = index.shards["bytes"].sum() / 1e9
    said = (
        f"{index.folder}: {len(index):,} samples in {len(index.shards):,} shards ({size:,.3f} GB), index"
        f" {index.fingerprint}; left out: {gone}; {index.about['bad_shards']} of {index.about['files']:,}"
        f" files are not whole; see histogram.png and left_out.jsonl there"
    )
    return said + ("; changed since the last index: " + "; ".join(changes) if changes else "")


def histograms(index: CorpusIndex) -> dict[str, np.ndarray]:
    """Counts of the shorter sides (see ``SIDES``) and aspects (``ASPECTS``), read piece by piece."""
    found = {"sides": np.zeros(len(SIDES) - 1, int), "aspects": np.zeros(len(ASPECTS) - 1, int)}
    for start in range(0, len(index), CHUNK):
        own = index.samples[start : start + CHUNK]
        width, height = own["width"].astype(float), own["height"].astype(float)
        found["sides"] += np.histogram(np.clip(np.minimum(width, height), SIDES[0], SIDES[-1]), SIDES)[0]
        found["aspects"] += np.histogram(np.clip(width / height, ASPECTS[0], ASPECTS[-1]), ASPECTS)[0]
    return found


def draw_histograms(index: CorpusIndex, path: Path) -> None:
    """A picture of the sizes, aspects and buckets of a corpus, and of what is left out."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    counts = histograms(index)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _steps(axes[0, 0], SIDES, counts["sides"], "shorter side in pixels")
    _steps(axes[0, 1], ASPECTS, counts["aspects"], "width / height")
    sizes = index.about["rules"]["buckets"]
    names = [f"{w}x{h}" for w, h in sizes] or ["square"]
    _bars(axes[1, 0], dict(zip(names, index.buckets.sum(0).tolist(), strict=True)), "bucket")
    _bars(axes[1, 1], {"used": len(index), **left_out(index)}, "used and left out")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _steps(axes: Any, edges: np.ndarray, counts: np.ndarray, what: str) -> None:
    axes.stairs(counts, edges, fill=True, alpha=0.7)
    axes.set(xscale="log", xlabel=what, ylabel="samples")


def _bars(axes: Any, counts: dict[str, int], what: str) -> None:
    axes.bar(list(counts), list(counts.values()), alpha=0.7)
    axes.set(xlabel=what, ylabel="samples")
    axes.tick_params(axis="x", labelrotation=60)
