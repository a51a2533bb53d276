"""What a vocabulary makes of captions, beside what CLIP's byte pairs make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require_packages
from ..files import to_json

#: Our vocabulary's counts of the same captions, then CLIP's.
Pair = tuple["Counts", "Counts"]
_NAMES = ("SentencePiece", "CLIP's byte pairs")


@dataclass(frozen=True)
class Counts:
    """Tokens of captions.

    Attributes:
        lengths: (N,) tokens of each caption, markers not counted.
        unknown: tokens that stand for what the vocabulary does not know.
        characters: of all captions, blanks not counted.
    """

    lengths: np.ndarray
    unknown: int
    characters: int

    def facts(self, room: int) -> dict[str, Any]:
        """The figures of the report.

        Args:
            room: tokens that a text encoder reads of a caption.
        """
        total = int(self.lengths.sum())
        return {
            "captions": len(self.lengths),
            "tokens_per_caption": round(float(self.lengths.mean()), 3),
            "longest": int(self.lengths.max()),
            "tokens_per_character": round(total / max(1, self.characters), 3),
            "unknown": self.unknown,
            "cut": int((self.lengths > room).sum()),
        }


def count_tokens(
    captions: Iterable[str], tokenize: Callable[[str], list[int]], unknown: int | None = None
) -> Counts:
    """Count the tokens of captions.

    Args:
        captions: texts, at least one.
        tokenize: ids of a text, without markers.
        unknown: id of what is not known; None where all is, as by bytes.
    """
    captions = list(captions)
    # Captions repeat.
    ids = {caption: tokenize(caption) for caption in dict.fromkeys(captions)}
    rows = [ids[caption] for caption in captions]
    return Counts(
        np.array([len(row) for row in rows]),
        0 if unknown is None else sum(row.count(unknown) for row in rows),
        sum(len("".join(caption.split())) for caption in captions),
    )


def write_report(counts: Mapping[str, Pair], pieces: int, folder: Path, positions: int) -> str:
    """Write ``report.json``, ``report.txt`` and ``report.png``.

    Args:
        counts: by part of the data.
        pieces: of the vocabulary.
        folder: where to.
        positions: tokens that a text encoder reads, markers counted.

    Returns:
        The text.
    """
    room = {_NAMES[0]: positions - 1, _NAMES[1]: positions - 2}  # one marker, and two
    facts = {
        part: {name: one.facts(room[name]) for name, one in zip(_NAMES, pair, strict=True)}
        for part, pair in counts.items()
    }
    text = _table(facts, pieces)
    (folder / "report.json").write_bytes(to_json({"pieces": pieces, **facts}, 2) + b"\n")
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    draw_lengths(counts["training"], folder / "report.png")
    return text


def _table(facts: Mapping[str, Mapping[str, Mapping[str, Any]]], pieces: int) -> str:
    head = f"{'captions':<12}{'number':>8}  {'cut by':<18}{'tokens':>8}{'longest':>9}"
    lines = [f"{pieces} pieces", head + f"{'a character':>13}{'unknown':>9}{'too long':>10}"]
    for part, by_name in facts.items():
        for name, one in by_name.items():
            lines.append(
                f"{part:<12}{one['captions']:>8}  {name:<18}{one['tokens_per_caption']:>8.2f}"
                f"{one['longest']:>9}{one['tokens_per_character']:>13.2f}{one['unknown']:>9}{one['cut']:>10}"
            )
    return "\n".join(lines)


def draw_lengths(pair: Pair, path: Path) -> None:
    """How many captions take how many tokens, by either vocabulary."""
    require_packages("a chart")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    longest = max(int(one.lengths.max()) for one in pair)
    # At most sixty bars, each of a whole number of tokens.
    edges = np.arange(0, longest + 2 + longest // 60, 1 + longest // 60) - 0.5
    for name, one, colour in zip(_NAMES, pair, ("tab:blue", "tab:orange"), strict=True):
        label = f"{name}, {one.lengths.mean():.1f}"
        axes.hist(one.lengths, bins=edges.tolist(), alpha=0.6, label=label, color=colour)
    axes.set(xlabel="tokens of a caption", ylabel="captions")
    axes.legend(title="mean", frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
