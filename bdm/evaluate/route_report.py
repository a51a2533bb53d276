"""The comparison of routes as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import RoutesConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid
from .combinations import NAMES

#: Columns of the tables: the figure's name, and its heading. Shares have a standard error beside them.
CONTENT = {
    "native_top1": "native things", "top1": "all things", "held_out_pairs": "new pairs",
    "native_look": "native look", "english_kept": "English kept", "guidance": "guidance",
}  # fmt: skip
CONTROLS = {
    "control_shuffled_top1": "shuffled captions", "control_empty_top1": 'prompt ""',
}  # fmt: skip
COST = {
    "trained_parameters": "parameters trained", "samples": "samples", "pretraining": "samples before",
    "samples_to_50": "to 50%", "samples_to_90": "to 90%", "step_seconds": "s a step",
    "picture_cost": "picture", "unet_tensors_changed": "tensors changed",
    "unet_relative_distance": "distance", "tokens": "tokens", "unknown": "with unknowns",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A route's row of the picture.

    Attributes:
        title: of the route.
        labels: N texts.
        pictures: (N, 3, H, W) in [-1, 1].
    """

    title: str
    labels: Sequence[str]
    pictures: Tensor


def routes_picture(samples: Sequence[Sample]) -> Image.Image:
    """Rows routes, columns the same prompts."""
    pictures = torch.cat([sample.pictures for sample in samples])
    labels = [f"{sample.title}: {label}" for sample in samples for label in sample.labels]
    return labelled_grid(to_pixels(pictures.cpu()), labels, columns=len(samples[0].labels), scale=3)


def routes_report(config: RoutesConfig, result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    judges = f"judge `{config.judge}`" + (
        f"; in brackets what `{config.second_judge}` says" if config.second_judge else ""
    )
    lines = [
        f"# Routes, {config.language}",
        "",
        (
            f"Backbone `{config.base}`, {judges}. {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, seed {config.seed}, the guidance of"
            f" {', '.join(f'{g:g}' for g in config.guidances)} that is best for each route on other prompts"
            f" and seeds. Shares with their standard errors; chance is {result['chance']:.4f}. The backbone"
            f" alone, told English: {_cell(result['backbone'], 'english_kept')}."
        ),
        "",
        *_table(config, result, CONTENT | CONTROLS),
    ]
    if config.plugins is not None:
        columns = {
            f"{name}_{what}": f"{name}, {what}" for name in NAMES for what in ("effect", "without", "content")
        }
        lines += ["", "## Plug-ins", "", *_table(config, result, columns), *_refusals(result)]
    lines += [
        "",
        "## Cost",
        "",
        "To a share of the reference's accuracy: samples of the first kept state that has it. A picture costs"
        " so many times what one of the backbone's costs that is told English.",
        "",
        *_table(config, result, COST),
        "",
        "![rows routes, columns prompts](routes.png)",
        "",
    ]
    return "\n".join(lines)


def _refusals(result: dict[str, Any]) -> list[str]:
    said = [
        f"* {name}, {plugin}: {reason}"
        for name, row in result["routes"].items()
        for plugin, reason in (row.get("plugins_refused") or {}).items()
    ]
    return ["", "Refused:", "", *said] if said else []


def _table(config: RoutesConfig, result: dict[str, Any], columns: dict[str, str]) -> list[str]:
    rows = [
        f"| {config.routes[name].title or name} | {' | '.join(_cell(row, key) for key in columns)} |"
        for name, row in result["routes"].items()
    ]
    return [f"| route | {' | '.join(columns.values())} |", f"| --- |{' --- |' * len(columns)}", *rows]


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if f"{key}_se" in row:
        second = row.get(f"second_{key}")
        return f"{value:.3f} ± {row[f'{key}_se']:.3f}" + (f" ({second:.3f})" if second is not None else "")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
