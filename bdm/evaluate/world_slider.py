"""Which world a picture shows over the range of the world slider (see ``bdm.pipeline.world``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluateConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..emoji.world import World
from ..extras import require_packages
from .guidance import choose
from .report import judged_share
from .setup import open_evaluation, write_result
from .shares import Share, flat_figures
from .trials import Score, Trial, draw, make_trials, score

#: Pictures of each row that are shown.
SHOWN = 8
#: Beside the slider's values: what the English prompts draw without the branch.
BARE = "english"


def evaluate_slider(config: EvaluateConfig, values: Sequence[float]) -> dict[str, Any]:
    """Draw the things that the worlds see differently at every value, in both languages, and judge them.

    All rows have the same prompts and seeds. Writes ``report.md``, ``result.json``, ``curve.png`` and
    ``grid.png`` into ``config.out``.

    Args:
        config: model and judges.
        values: of the slider, from 0 to 1.

    Returns:
        The figures by value, as printed, and those of the English prompts without the branch.

    Raises:
        UserError: see ``open_evaluation``.
    """
    require_packages("a chart")
    opened = open_evaluation(config)
    trial = slider_trial(opened.world, config)
    config, _ = choose(opened, config, [trial])
    worlds: dict[str, float | None] = {f"{value:g}": value for value in values}
    worlds[BARE] = None
    scores: dict[str, dict[str, Score]] = {}
    shown: list[Tensor] = []
    for name, world in worlds.items():
        one = (
            trial if world is not None else replace(trial, native=[""] * len(trial.native), branch_scale=0.0)
        )
        one = replace(one, name=f"world {name}")
        pictures = draw(
            opened.pipe, one, config.steps, config.guidance, config.batch, config.seed, world=world
        )
        scores[name] = {prefix: score(judge, pictures, one) for prefix, judge in opened.judges.items()}
        shown.append(pictures[:: max(1, len(pictures) // SHOWN)][:SHOWN])
    rows = {name: _figures(found) for name, found in scores.items()}
    result = {"rows": rows, "pictures": len(trial.native), "guidance": config.guidance}
    save_picture(_grid(trial, list(worlds), shown), config.out / "grid.png")
    plot_curve({value: scores[f"{value:g}"] for value in values}, scores[BARE], config.out / "curve.png")
    write_result(config.out, result, _report(config, trial, scores))
    return result


def slider_trial(world: World, config: EvaluateConfig) -> Trial:
    """The things that the worlds see differently, named in both languages, as often as ``controls`` says."""
    trials = make_trials(world, config.controls, config.seed, None, config.pictures)
    (trial,) = [one for one in trials if one.name == "different"]
    english = [world.caption(concept, None, "en") for concept in trial.concepts]
    title = "Things that the worlds see differently, named in both languages"
    return replace(trial, title=title, english=english)


def _figures(scores: Mapping[str, Score]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for prefix, found in scores.items():
        figures |= flat_figures({"concept": found.concept, "native_look": found.openmoji}, prefix)
    return figures


def _grid(trial: Trial, names: Sequence[str], shown: Sequence[Tensor]) -> Any:
    """Rows of values, columns of things."""
    every = max(1, len(trial.native) // SHOWN)
    texts = trial.native[::every][:SHOWN]
    labels = [f"{name}: {text}" for name in names for text in texts]
    return labelled_grid(to_pixels(torch.cat(list(shown))), labels, columns=len(texts), scale=2)


def plot_curve(scores: Mapping[float, Mapping[str, Score]], bare: Mapping[str, Score], path: Path) -> None:
    """A line with standard errors for each share, over the slider; dashed, what English draws alone.

    Args:
        scores: by the slider's value and the judges' prefix.
        bare: of the English prompts without the branch.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for prefix in bare:
        for field, title in (
            ("concept", "the thing is right"),
            ("openmoji", "it looks as in the native world"),
        ):
            shares: list[Share] = [getattr(found[prefix], field) for found in scores.values()]
            label = f"{title} (second judge)" if prefix else title
            errors = [share.error for share in shares]
            (line, *_) = axes.errorbar(
                [*scores], [share.value for share in shares], errors, label=label, marker="."
            )
            alone: Share = getattr(bare[prefix], field)
            axes.axhline(alone.value, color=line.get_color(), linestyle="--", linewidth=0.8)
    axes.set(xlabel="world (0 native, 1 English); dashed: English without the branch", ylim=(0, 1.02))
    axes.set_ylabel("share of pictures")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _report(config: EvaluateConfig, trial: Trial, scores: Mapping[str, Mapping[str, Score]]) -> str:
    lines = [
        "# Between two worlds",
        "",
        f"Model `{config.model}`, branch `{config.branch or 'its own'}`, {config.steps} steps of"
        f" {config.sampler or 'the default sampler'}, guidance {config.guidance:g}, seed {config.seed}:"
        f" {len(trial.native)} pictures a row, the same prompts and seeds in all, of things that the worlds"
        " see differently, named in both languages. Shares with their standard errors; in brackets what the"
        " second judge says.",
        "",
        "| world | the thing is right | it looks as in the native world |",
        "| --- | --- | --- |",
    ]
    for name, found in scores.items():
        title = "English prompts, no branch" if name == BARE else name
        cells = [judged_share(dict(found), field) for field in ("concept", "openmoji")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![shares over the slider](curve.png)", "", "![pictures](grid.png)", ""])
