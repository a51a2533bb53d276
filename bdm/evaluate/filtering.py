"""What a filter on the scores of picture and caption lets through, and how well a route learns from that.

As Japanese Stable Diffusion's data were filtered by a Japanese CLOOB. In the emoji world it is known which
captions are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FilterConfig, RouteConfig
from ..config.data import EmojiConfig
from ..data.prepared import MANIFEST
from ..data.prepared_table import NO_SCORE, read_table
from ..emoji.world import EmojiSource, World
from ..errors import UserError
from ..extras import require_packages
from ..files import check_writable
from ..formats.weights import read_json
from ..training.recipes.build import build_source
from .route import open_route
from .setup import open_judges, refuse_other_size, write_result
from .shares import Share
from .trials import score, sweep_trials

#: Thresholds of the curve.
POINTS = 60


@dataclass(frozen=True)
class Filter:
    """Scores of N samples.

    Attributes:
        scores: (N,) of picture and caption.
        wrong: (N,) bool, whether the caption is another picture's.
    """

    scores: np.ndarray
    wrong: np.ndarray

    @property
    def ranking(self) -> float:
        """How often a right caption has a higher score than a wrong one; 0.5 is chance, 1 the best."""
        wrong, right = np.sort(self.scores[self.wrong]), self.scores[~self.wrong]
        below, up_to = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
        return float((below + up_to).mean() / 2 / len(wrong))  # equal ones count half

    def kept(self, threshold: float) -> tuple[float, float]:
        """What passes a threshold: the share of the right captions, and the share of wrong ones among it."""
        passed = self.scores >= threshold
        right = float((passed & ~self.wrong).sum() / (~self.wrong).sum())
        return right, float((passed & self.wrong).sum() / max(1, passed.sum()))


def read_filter(folder: str) -> tuple[Filter, EmojiSource]:
    """The scores of a prepared folder, and the source that says which captions are wrong.

    Raises:
        UserError: it was prepared from other data than the emoji world with wrong captions, without a scorer,
            or with a threshold.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} holds no prepared shards; run: bdm prepare configs/routes/prepare_filter.yaml"
        )
    manifest = read_json(path)
    data = manifest["data"]
    if data.get("kind") != "emoji" or not data.get("wrong_captions"):
        raise UserError(
            f"{folder} was prepared from data without known wrong captions; prepare the emoji world with"
            " data.wrong_captions, such as 0.3"
        )
    if manifest["scorer"] is None or manifest["min_score"] is not None:
        raise UserError(
            f"{folder} was prepared without a scorer, or with a threshold; set scorer, and leave min_score"
            " out"
        )
    source = build_source(EmojiConfig(**data))
    table = read_table(folder, "train")
    assert isinstance(source, EmojiSource)
    if table is None or len(table.rows) != len(source.rows) or (table.rows["score"] == NO_SCORE).any():
        raise UserError(f"{folder} lacks samples or their scores; run bdm prepare to its end")
    wrong = np.array([row.wrong for row in source.rows])
    return Filter(table.rows["score"] / 10_000, wrong), source


def evaluate_filter(config: FilterConfig) -> dict[str, Any]:
    """Score a filter; writes ``report.md``, ``result.json`` and ``filter.png`` into ``config.out``.

    Returns:
        What is printed.

    Raises:
        UserError: see ``read_filter``, or a route that cannot be read.
    """
    require_packages("a chart")
    check_writable(config.out)
    found, source = read_filter(config.prepared)
    accuracy = _routes(config, source)
    config.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"samples": len(found.scores), "wrong": round(float(found.wrong.mean()), 4),
                              "ranking": round(found.ranking, 4)}  # fmt: skip
    result["routes"] = {
        name: {
            "min_score": config.routes[name].min_score,
            "right_kept": round(found.kept(config.routes[name].min_score)[0], 4),
            "wrong_among_kept": round(found.kept(config.routes[name].min_score)[1], 4),
            "top1": round(share.value, 4),
            "top1_se": round(share.error, 4),
        }
        for name, share in accuracy.items()
    }
    points = [(config.routes[name].min_score, share) for name, share in accuracy.items()]
    draw_filter(found, points, config.out / "filter.png")
    write_result(config.out, result, _report(config, result))
    return result


def _routes(config: FilterConfig, source: EmojiSource) -> dict[str, Share]:
    """Top-1 of what each route draws."""
    if not config.routes:
        return {}
    if config.judge is None:
        raise UserError("routes are given, and judge is not; give the folder of one")
    world: World = source.world
    judges = open_judges(config.judge, None, world)
    language = source.rows[0].language
    trial, _ = sweep_trials(world, config.controls, config.seed, language)
    shares: dict[str, Share] = {}
    for name, one in config.routes.items():
        route = open_route(name, RouteConfig(model=one.model), world, language, None)
        refuse_other_size(route.pipe, one.model, judges, {"": config.judge})
        pictures = route.draw(trial, config.steps, config.guidance, config.batch, config.seed)
        shares[name] = score(judges[""], pictures, trial).concept
    return shares


def draw_filter(found: Filter, routes: Sequence[tuple[float, Share]], path: Path) -> None:
    """A histogram of right and wrong captions' scores.

    Below it what each threshold lets through, and how well routes learned from that.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    parts = [found.scores[~found.wrong], found.scores[found.wrong]]
    above.hist(parts, bins=POINTS, stacked=True, label=["right", "wrong"], color=["tab:blue", "tab:red"])
    above.set(ylabel="samples")
    above.legend()
    thresholds = np.linspace(found.scores.min(), found.scores.max(), POINTS)
    right, wrong = np.array([found.kept(one) for one in thresholds]).T
    below.plot(thresholds, right, color="tab:blue", label="right captions kept")
    below.plot(thresholds, wrong, color="tab:red", label="wrong ones among the kept")
    if routes:
        places, shares = zip(*sorted(routes, key=lambda pair: pair[0]), strict=True)
        values, errors = [share.value for share in shares], [share.error for share in shares]
        below.errorbar(places, values, errors, color="black", marker="o", label="top-1 of the trained route")
    below.set(xlabel="threshold: Chinese CLIP's score of picture and caption", ylabel="share", ylim=(0, 1))
    below.legend()
    figure.savefig(path, dpi=110)


def _report(config: FilterConfig, result: dict[str, Any]) -> str:
    lines = [
        "# Filtering",
        "",
        f"`{config.prepared}`: {result['samples']:,} samples, {result['wrong']:.0%} with another picture's"
        f" caption. A right caption has a higher score than a wrong one in {result['ranking']:.1%} of the"
        " pairs of one and the other (chance: 50%).",
        "",
        "| route | threshold | right captions kept | wrong among the kept | top-1 |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {row['min_score']:g} | {row['right_kept']:.3f} | {row['wrong_among_kept']:.3f} |"
            f" {row['top1']:.3f} ± {row['top1_se']:.3f} |"
            for name, row in result["routes"].items()
        ),
        "",
        "![scores, and what each threshold lets through](filter.png)",
        "",
    ]
    return "\n".join(lines)
