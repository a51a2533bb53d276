"""Which plug-ins work together: all combinations of four as a table, ratios and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluateConfig, PluginFilesConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..emoji.world import World
from .combinations import NAMES, Combination, Combined, Figures, ratios
from .guidance import Sweeps, choose, sweep_lines
from .setup import below_reach, open_evaluation, write_result
from .shares import flat_figures

#: Ratios below these are named in the report.
REACH = {
    "single_content_ratio": 0.95,
    "single_effect_ratio": 0.9,
    "all_content_ratio": 0.8,
    "all_effect_ratio": 0.8,
    "all_content": 0.6,
}


def evaluate_combinations(config: EvaluateConfig, plugins: PluginFilesConfig) -> dict[str, Any]:
    """Score every combination with Chinese prompts, and with English ones on the bare backbone.

    Writes ``report.md``, ``result.json`` and ``grid.png`` into ``config.out``.

    Returns:
        What is printed: the worst ratios and the rows, of each judge.

    Raises:
        UserError: a judge that does not know what the plug-ins draw, or see ``open_evaluation``.
    """
    opened = open_evaluation(config)
    combined = Combined.of(opened, config, plugins)
    config, sweeps = choose(opened, config, [combined.trial((False,) * len(NAMES))])
    rows: dict[str, dict[Combination, Figures]] = {prefix: {} for prefix in opened.judges}
    shown: dict[Combination, Tensor] = {}
    for on in combined.combinations():
        shown[on] = combined.draw(opened.pipe, config, on, native=True)
        for prefix, judge in opened.judges.items():
            rows[prefix][on] = combined.measure(judge, shown[on])
    english = combined.figures(opened.pipe, config, opened.judges, native=False)
    result: dict[str, Any] = {"guidance": config.guidance}
    for prefix in opened.judges:
        result |= {prefix + key: value for key, value in ratios(rows[prefix], english[prefix]).items()}
        result[f"{prefix}rows"] = [_row(on, figures) for on, figures in rows[prefix].items()]
        result[f"{prefix}english"] = [_row(on, figures) for on, figures in english[prefix].items()]
    save_picture(_grid(opened.world, combined.concepts, shown), config.out / "grid.png")
    write_result(config.out, result, _report(config, plugins, result, sweeps))
    return result


def _row(on: Combination, figures: Figures) -> dict[str, Any]:
    return {
        "on": [name for name, wanted in zip(NAMES, on, strict=True) if wanted],
        **flat_figures(figures),
    }


def _grid(
    world: World, concepts: Sequence[int], shown: Mapping[Combination, Tensor], count: int = 8
) -> Image.Image:
    """Rows concepts, columns plug-ins: none, each alone, all together."""
    columns = [on for on in shown if sum(on) in (0, 1, len(NAMES))]
    titles = ["none" if not any(on) else "all" if all(on) else NAMES[on.index(True)] for on in columns]
    pictures, labels = [], []
    for i in range(0, len(concepts), max(1, len(concepts) // count)):
        for on, title in zip(columns, titles, strict=True):
            pictures.append(shown[on][i])
            labels.append(f"{world.caption(concepts[i], None, 'zh')} {title}")
    return labelled_grid(to_pixels(torch.stack(pictures)), labels, columns=len(columns), scale=3)


def _report(
    config: EvaluateConfig, plugins: PluginFilesConfig, result: dict[str, Any], sweeps: Sweeps
) -> str:
    lines = [
        "# Combinations of plug-ins",
        "",
        (
            f"Model `{config.model}`, {config.controls} Chinese prompts a row, {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, guidance {config.guidance}, seed {config.seed}."
            " Content: top-1 of the concept. Checkpoint: black outline. LoRA: red seal. ControlNet: F1 of"
            " the given (mirrored) edges and the picture's. Embedding: its background. Strengths: LoRA"
            f" {plugins.lora_strength:g}, ControlNet {plugins.controlnet_strength:g}."
        ),
        below_reach(result, REACH),
        *sweep_lines(config, sweeps),
        "",
        "![rows concepts, columns plug-ins](grid.png)",
    ]
    tables = {"rows": "Chinese prompts through the branch", "english": "English prompts, bare backbone"}
    judges = {"": ""} | ({"second_": ", second judge"} if config.second_judge else {})
    for prefix, rows in product(judges, tables):
        lines += [
            "",
            f"## {tables[rows]}{judges[prefix]}",
            "",
            "| on | content | checkpoint | lora | controlnet | embedding |",
            "|---|---|---|---|---|---|",
        ]
        for row in result[prefix + rows]:
            cells = " | ".join(f"{row[key]:.3f} ± {row[f'{key}_se']:.3f}" for key in ("content", *NAMES))
            lines.append(f"| {' + '.join(row['on']) or 'none'} | {cells} |")
    lines += ["", "| ratio | first judge | second judge |", "|---|---|---|"]
    lines += [f"| {key} | {result[key]} | {result.get(f'second_{key}', '')} |" for key in REACH]
    lines.append("")
    return "\n".join(lines)
