"""Ways to train or to guide a branch beside each other: content, two languages in one picture, plug-ins.

All rows draw the same prompts with the same seeds on one backbone, each with the guidance that is best for it
on other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import AblationRowConfig, EvaluateConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..method.branch import BranchModel
from .combinations import NAMES, Combined, ratios
from .guidance import choose
from .plugins import REACH as KEPT
from .report import REACH, trial_figures
from .setup import Evaluation, below_reach, open_evaluation, write_result
from .shares import flat_figures
from .trials import composed, draw, make_trials, score

#: The trials of a row; what plug-ins do to it comes besides.
TRIALS = ("chinese", "native", "different", "held_out", "mixed")
#: Pictures of each row that are shown.
SHOWN = 6


@dataclass(frozen=True)
class Row:
    """What came of a row.

    Attributes:
        figures: of both judges.
        pictures: (SHOWN, 3, H, W) in [-1, 1]: prompts in two languages.
        labels: what they were told.
    """

    figures: dict[str, Any]
    pictures: Tensor
    labels: list[str]


def evaluate_ablation(config: EvaluateConfig, rows: Mapping[str, AblationRowConfig]) -> dict[str, Any]:
    """Draw and score all rows.

    Writes ``report.md``, ``result.json`` and ``grid.png`` into ``config.out``.

    Returns:
        The figures by row, as printed.

    Raises:
        UserError: see ``open_evaluation``, or a row's branch cannot be read.
    """
    opened = open_evaluation(config)
    branches = {
        name: BranchModel.from_pretrained(row.branch, torch_dtype=torch.float32).eval()
        for name, row in rows.items()
    }
    table = Ablation(opened, config)
    made: dict[str, Row] = {}
    for name, row in rows.items():
        opened.pipe.branch = branches[name]
        made[name] = table.row(row.composed)
    result = {"rows": {name: row.figures for name, row in made.items()}, "english": table.bare_rows()}
    save_picture(_grid(rows, made), config.out / "grid.png")
    write_result(config.out, result, _report(config, rows, result))
    return result


class Ablation:
    """What the rows share: prompts, judges, and what the bare backbone keeps beside the plug-ins.

    Args:
        opened: what draws and who judges.
        config: the evaluation.
    """

    def __init__(self, opened: Evaluation, config: EvaluateConfig) -> None:
        self._opened, self._config = opened, config
        self._combined = Combined.of(opened, config, config.plugins) if config.plugins else None
        self._bare: dict[str, Any] = {}

    def row(self, apart: bool) -> Row:
        """The figures of the branch that the pipeline has now.

        Args:
            apart: whether the English prompts have a strength of their own.
        """
        config = self._config if apart else self._config.model_copy(
            update={"english_guidance": None, "english_guidance_sweep": ()}
        )  # fmt: skip
        config, _ = choose(self._opened, config, self._trials(config))
        figures: dict[str, Any] = {
            "guidance": config.guidance, "english_guidance": config.english_guidance
        }  # fmt: skip
        figures |= self._content(config)
        shown, labels = self._shown(config)
        return Row(figures | self._kept(config), shown, labels)

    def bare_rows(self) -> dict[str, Any]:
        """The content that the bare backbone keeps with English prompts and the plug-ins, by judge."""
        return {
            f"{prefix}content{''.join(f'_{n}' for n, on in zip(NAMES, which, strict=True) if on)}": round(
                figures["content"].value, 4
            )
            for prefix, rows in self._bare.items()
            for which, figures in rows.items()
        }

    def _trials(self, config: EvaluateConfig) -> list[Any]:
        every = make_trials(self._opened.world, config.controls, config.seed, None, config.pictures)
        chosen = [trial for trial in every if trial.name in TRIALS]
        if config.english_guidance is None:
            return chosen
        apart = config.english_guidance
        return [composed(one, apart) if one.name == "mixed" else one for one in chosen]

    def _draw(self, config: EvaluateConfig, trial: Any) -> Tensor:
        return draw(self._opened.pipe, trial, config.steps, config.guidance, config.batch, config.seed)

    def _content(self, config: EvaluateConfig) -> dict[str, Any]:
        judges = self._opened.judges
        scores: dict[str, dict[str, Any]] = {prefix: {} for prefix in judges}
        for trial in self._trials(config):
            pictures = self._draw(config, trial)
            for prefix, judge in judges.items():
                scores[prefix][trial.name.removesuffix("_composed")] = score(judge, pictures, trial)
        found: dict[str, Any] = {}
        for prefix in judges:
            found |= flat_figures(trial_figures(scores[prefix]), prefix)
        return found

    def _kept(self, config: EvaluateConfig) -> dict[str, Any]:
        if self._combined is None:
            return {}
        pipe, judges = self._opened.pipe, self._opened.judges
        if not self._bare:  # it knows nothing of branches, and is drawn once for all of them
            self._bare = self._combined.figures(pipe, self._config, judges, native=False)
        native = self._combined.figures(pipe, config, judges, native=True)
        return {
            prefix + key: value
            for prefix in judges
            for key, value in ratios(native[prefix], self._bare[prefix]).items()
        }

    def _shown(self, config: EvaluateConfig) -> tuple[Tensor, list[str]]:
        trial = self._trials(config)[-1]
        some = slice(0, len(trial.native), max(1, len(trial.native) // SHOWN))
        trial = replace(
            trial, native=trial.native[some][:SHOWN], english=trial.english[some][:SHOWN],
            concepts=trial.concepts[some][:SHOWN], colours=trial.colours[some][:SHOWN],
        )  # fmt: skip
        labels = [f"{a} + {b}" for a, b in zip(trial.native, trial.english, strict=True)]
        return self._draw(config, trial), labels


def _grid(rows: Mapping[str, AblationRowConfig], made: Mapping[str, Row]) -> Image.Image:
    """Rows as in the table, columns prompts in two languages."""
    pictures = torch.cat([row.pictures for row in made.values()])
    labels = [f"{rows[name].title or name}: {label}" for name, row in made.items() for label in row.labels]
    columns = len(next(iter(made.values())).labels)
    return labelled_grid(to_pixels(pictures), labels, columns=columns, scale=2)


def _report(config: EvaluateConfig, rows: Mapping[str, AblationRowConfig], result: Mapping[str, Any]) -> str:
    columns = ("guidance", "english_guidance", "chinese_top1", "native_top1", "native_look",
               "held_out_pairs", "mixed_both", *(KEPT if config.plugins else ()))  # fmt: skip
    lines = [
        "# Ways to train a branch",
        "",
        f"Model `{config.model}`, {config.steps} steps of {config.sampler or 'the default sampler'}, seed"
        f" {config.seed}, {config.controls} prompts a row at least; the guidance of"
        f" {', '.join(f'{g:g}' for g in config.guidance_sweep) or config.guidance} that is best for each row"
        f" on other prompts, {config.guidance:g} for the bare backbone. Shares with their standard errors; in"
        " brackets what the second judge says. Ratios are to the same without plug-ins (content) and to the"
        " bare backbone (effects).",
        "",
        f"| row | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for name, row in rows.items():
        figures = result["rows"][name]
        cells = " | ".join(_cell(figures, key) for key in columns)
        lines.append(f"| {row.title or name} | {cells} |")
    lines += ["", *(f"{name}: {below_reach(result['rows'][name], REACH | KEPT)}\n" for name in rows)]
    return "\n".join([*lines, "![rows as in the table, columns prompts in two languages](grid.png)", ""])


def _cell(figures: Mapping[str, Any], key: str) -> str:
    value = figures.get(key)
    if value is None:
        return "–"
    error = f" ± {figures[f'{key}_se']:.3f}" if f"{key}_se" in figures else ""
    second = figures.get(f"second_{key}")
    return f"{value:.3f}{error}" + (f" ({second:.3f})" if second is not None else "")
