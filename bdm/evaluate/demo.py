"""One picture for people: what a bridge draws, a row for each of its promises.

Native things, things that two worlds see differently (both worlds below each other), two languages in one
picture, each plug-in alone, and all together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluateConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..emoji.world import COLOUR_NAMES, World
from .combinations import NAMES, Combined
from .setup import Evaluation, open_evaluation, write_result
from .shares import flat_figures
from .trials import Trial, draw, score

#: What is asked for, in this order, as far as a world has it.
NATIVE, DIFFERENT, SHARED = "🏮🧧🥮🐼🥟🪭🐉🥁", "🍎🐱🏠☂🚲🎸🌻🚀", "🐧🦊🍋🏰🐬🍄🦉🌵🎃🐙"

#: Pixels of a picture's side at most, where it can be enlarged as a whole.
SHOWN_SIDE = 144


@dataclass(frozen=True)
class DemoRow:
    """Pictures of one promise.

    Attributes:
        name: of the row.
        trial: what was asked for.
        pictures: (N, 3, H, W) in [-1, 1].
    """

    name: str
    trial: Trial
    pictures: Tensor


def draw_demo(config: EvaluateConfig, count: int) -> dict[str, Any]:
    """Draw the grid; writes ``grid.png``, ``report.md`` and ``result.json`` into ``config.out``.

    Args:
        config: model, judges and, if wanted, plug-ins.
        count: pictures of each row.

    Returns:
        The first judge's share of right pictures for each row, as printed.

    Raises:
        UserError: see ``open_evaluation``.
    """
    opened = open_evaluation(config)
    made = list(_rows(opened, config, count))
    pictures = torch.cat([row.pictures for row in made])
    labels = [text for row in made for text in _labels(row)]
    scale = max(1, SHOWN_SIDE // opened.size)
    save_picture(labelled_grid(to_pixels(pictures), labels, count, scale=scale), config.out / "grid.png")
    hits = {row.name: score(opened.judge, row.pictures, row.trial) for row in made}
    figures = flat_figures({name: one.both or one.concept for name, one in hits.items()})
    write_result(config.out, figures, _report(config, made, figures))
    return figures


def demo_trials(world: World, count: int) -> list[Trial]:
    """The rows without plug-ins."""
    native, different = (_chosen(world, texts, count) for texts in (NATIVE, DIFFERENT))
    shared = _chosen(world, SHARED, count)
    colours = [COLOUR_NAMES[1 + i % (len(COLOUR_NAMES) - 1)] for i in range(count)]
    chinese = [world.caption(i, None, "zh") for i in different]
    silent = [""] * count
    here = Trial("seen here", "", chinese, silent, different)
    return [
        Trial("native", "", [world.caption(i, None, "zh") for i in native], silent, native),
        here,
        replace(
            here, name="seen there", native=silent,
            english=[world.caption(i, None, "en") for i in different], branch_scale=0,
        ),
        Trial(
            "two languages", "", [world.caption(i, None, "zh") for i in shared],
            [world.caption(None, colour, "en") for colour in colours], shared, colours,
        ),
    ]  # fmt: skip


def _rows(opened: Evaluation, config: EvaluateConfig, count: int) -> Iterator[DemoRow]:
    for trial in demo_trials(opened.world, count):
        if trial.name == "two languages" and config.english_guidance is not None:
            trial = replace(trial, english_guidance=config.english_guidance)
        pictures = draw(opened.pipe, trial, config.steps, config.guidance, config.batch, config.seed)
        yield DemoRow(trial.name, trial, pictures)
    if config.plugins is None:
        return
    small = config.model_copy(update={"controls": count})
    combined = Combined.of(opened, small, config.plugins)
    for which in (*([name] for name in NAMES), NAMES):
        on = tuple(name in which for name in NAMES)
        pictures = combined.draw(opened.pipe, small, on, native=True)
        yield DemoRow(_title(which), combined.trial(on, config.english_guidance), pictures)


def _title(which: Sequence[str]) -> str:
    return which[0] if len(which) == 1 else "all together"


def _chosen(world: World, wanted: str, count: int) -> list[int]:
    """So many concepts by their emoji; where a world lacks some, others of the first one's group."""
    numbers = {chr(concept.code): i for i, concept in enumerate(world.concepts)}
    found = [numbers[one] for one in wanted if one in numbers]
    group = world.concepts[found[0]].group if found else "shared"
    others = [i for i, one in enumerate(world.concepts) if one.group == group and i not in found]
    chosen = [*found, *others][:count]
    return (chosen * count)[:count]


def _labels(row: DemoRow) -> list[str]:
    return [
        f"{row.name}: {' + '.join(text for text in pair if text)}"
        for pair in zip(row.trial.native, row.trial.english, strict=True)
    ]


def _report(config: EvaluateConfig, rows: Sequence[DemoRow], figures: dict[str, float]) -> str:
    lines = [
        "# Demo",
        "",
        f"Model `{config.model}`, {config.steps} steps, guidance {config.guidance:g}, seed {config.seed}.",
        "",
        "| row | right, says the judge |",
        "| --- | --- |",
        *(f"| {row.name} | {figures[row.name]:.2f} |" for row in rows),
        "",
        "![a row for each promise](grid.png)",
        "",
    ]
    return "\n".join(lines)
