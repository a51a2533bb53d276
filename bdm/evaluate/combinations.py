"""Which plug-ins work together.

All 16 combinations of four, scored for content and for each plug-in's own effect.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluateConfig, PluginFilesConfig
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..emoji.judge import JudgeModel
from ..emoji.world import COLOUR_NAMES, World, compose, load_drawing
from ..errors import UserError
from ..plugins.controlnet import canny_edges
from .setup import below_reach, open_evaluation, write_result
from .trials import Trial, draw

#: The four plug-ins, in the order they are attached.
NAMES = ("checkpoint", "lora", "controlnet", "embedding")
#: Ratios below these are named in the report.
REACH = {
    "single_content_ratio": 0.9,
    "single_effect_ratio": 0.8,
    "all_content_ratio": 0.75,
    "all_effect_ratio": 0.75,
}

Figures = dict[str, float]


def evaluate_combinations(config: EvaluateConfig, plugins: PluginFilesConfig) -> dict[str, Any]:
    """Score every combination with Chinese prompts, and each plug-in with English ones on the bare backbone.

    Writes ``report.md``, ``result.json`` and ``grid.png`` into ``config.out``.

    Returns:
        What is printed: the worst ratios and the 16 rows.
    """
    opened = open_evaluation(config)
    world, judge = opened.world, opened.judge
    known = judge.config["treatments"]
    if not {"outlined", "sealed", "outlined_sealed"} <= set(known):
        raise UserError(
            f"the judge in {config.judge} tells apart {', '.join(known)}; the plug-ins draw outlines and"
            " seals: train a judge that knows both with configs/emoji/style_judge.yaml"
        )
    shared = [i for i, concept in enumerate(world.concepts) if concept.group == "shared"]
    concepts = sorted(random.Random(config.seed).sample(shared, min(config.controls, len(shared))))
    edges = [edge_picture(world, i, judge.config["size"], config.seed) for i in concepts]

    rows: dict[tuple[bool, ...], Figures] = {}
    shown: dict[tuple[bool, ...], Tensor] = {}
    english: dict[tuple[bool, ...], Figures] = {}
    combinations = sorted(product((False, True), repeat=len(NAMES)), key=sum)
    for on in combinations:
        chosen = [name for name, wanted in zip(NAMES, on, strict=True) if wanted]
        trials = {
            native: combination_trial(world, concepts, plugins, chosen, native) for native in (True, False)
        }
        pictures = draw_with(opened.pipe, config, plugins, trials[True], edges, chosen)
        rows[on], shown[on] = measure(judge, pictures, concepts, edges, plugins), pictures
        if sum(on) in (0, 1, len(NAMES)):
            pictures = draw_with(opened.pipe, config, plugins, trials[False], edges, chosen)
            english[on] = measure(judge, pictures, concepts, edges, plugins)
    result = ratios(rows, english)
    result["rows"] = [_row(on, rows[on]) for on in combinations]
    result["english"] = [_row(on, english[on]) for on in english]
    save_picture(_grid(world, concepts, shown), config.out / "grid.png")
    write_result(config.out, result, _report(config, plugins, result))
    return result


def edge_picture(world: World, concept: int, size: int, seed: int) -> Image.Image:
    """Edges of a real picture of a concept, mirrored, so that the concept's usual picture does not already
    have them.
    """
    drawing = load_drawing(world.concepts[concept].code, "twemoji").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return canny_edges(compose(drawing, "white", size, random.Random(f"{seed}/{concept}")))


def combination_trial(
    world: World, concepts: Sequence[int], plugins: PluginFilesConfig, chosen: Sequence[str], native: bool
) -> Trial:
    """Concepts with the trigger words of the chosen plug-ins.

    Native prompts, or English ones without the branch.
    """
    trigger = Path(plugins.embedding).stem
    words = [
        word for name, word in (("lora", plugins.lora_trigger), ("embedding", trigger)) if name in chosen
    ]
    names = [world.caption(i, None, "zh" if native else "en") for i in concepts]
    english = [", ".join([*([] if native else [name]), *words]) for name in names]
    title = f"{' + '.join(chosen) or 'none'}, {'Chinese' if native else 'English'}"
    return Trial(
        title, title, names if native else [""] * len(names), english, [*concepts], branch_scale=float(native)
    )


def draw_with(
    pipe: Any,
    config: EvaluateConfig,
    plugins: PluginFilesConfig,
    trial: Trial,
    edges: Sequence[Image.Image],
    chosen: Sequence[str],
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of a trial, with the chosen plug-ins attached for the time of it."""
    strengths = {"lora": plugins.lora_strength, "controlnet": plugins.controlnet_strength}
    try:
        for name in chosen:
            settings = {"strength": strengths[name]} if name in strengths else {}
            pipe.plugins.attach(getattr(plugins, name), name if name != "embedding" else None, **settings)
        control_images = edges if "controlnet" in chosen else None
        return draw(pipe, trial, config.steps, config.guidance, config.batch, config.seed, control_images)
    finally:
        pipe.plugins.clear()


@torch.no_grad()
def measure(
    judge: JudgeModel,
    pictures: Tensor,
    concepts: Sequence[int],
    edges: Sequence[Image.Image],
    plugins: PluginFilesConfig,
) -> Figures:
    """Content (top-1 of the concept) and the four effects, shares in [0, 1], of N pictures."""
    verdict = judge(pictures.float())

    def share(logits: Tensor, wanted: int) -> float:
        return (logits.argmax(1) == wanted).float().mean().item()

    def treated(how: str) -> float:
        return float(np.mean([how in judge.config["treatments"][i] for i in verdict.treatment.argmax(1)]))

    drawn = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in to_pixels(pictures)]
    return {
        "content": (verdict.concept.argmax(1) == torch.tensor(concepts)).float().mean().item(),
        "checkpoint": treated("outlined"),
        "lora": treated("sealed"),
        "controlnet": float(
            np.mean([edge_agreement(canny_edges(p), e) for p, e in zip(drawn, edges, strict=True)])
        ),
        "embedding": share(verdict.colour, COLOUR_NAMES.index(plugins.embedding_colour)),
    }


def edge_agreement(drawn: Image.Image, given: Image.Image) -> float:
    """F1 of two edge pictures, pixel by pixel: in pictures this small, a pixel aside is another place."""
    ours, theirs = (np.asarray(p.convert("L")) > 127 for p in (drawn, given))
    return float(2 * (ours & theirs).sum() / max(1, ours.sum() + theirs.sum()))


def ratios(rows: dict[tuple[bool, ...], Figures], english: dict[tuple[bool, ...], Figures]) -> dict[str, Any]:
    """The worst ratios: content with plug-ins to content without, effect beside the branch to effect on the
    bare backbone.

    An effect is what a plug-in adds to its own figure: with it, less without it, everything else being equal.
    """
    none, everything = (False,) * len(NAMES), (True,) * len(NAMES)
    singles = {name: tuple(name == other for other in NAMES) for name in NAMES}

    def effect(figures: dict[tuple[bool, ...], Figures], on: tuple[bool, ...], name: str) -> float:
        without = tuple(wanted and name != other for wanted, other in zip(on, NAMES, strict=True))
        return figures[on][name] - figures[without][name]

    def ratio(own: float, reference: float) -> float:
        return own / reference if reference > 0 else 0.0

    content = {name: ratio(rows[on]["content"], rows[none]["content"]) for name, on in singles.items()}
    effects = {name: ratio(effect(rows, on, name), effect(english, on, name)) for name, on in singles.items()}
    together = {
        name: ratio(effect(rows, everything, name), effect(english, singles[name], name)) for name in NAMES
    }
    return {
        "single_content_ratio": round(min(content.values()), 4),
        "single_effect_ratio": round(min(effects.values()), 4),
        "all_content_ratio": round(ratio(rows[everything]["content"], rows[none]["content"]), 4),
        "all_effect_ratio": round(min(together.values()), 4),
        "content_ratios": {name: round(value, 4) for name, value in content.items()},
        "effect_ratios": {name: round(value, 4) for name, value in effects.items()},
        "effect_ratios_together": {name: round(value, 4) for name, value in together.items()},
    }


def _row(on: tuple[bool, ...], figures: Figures) -> dict[str, Any]:
    return {
        "on": [name for name, wanted in zip(NAMES, on, strict=True) if wanted],
        **{k: round(v, 4) for k, v in figures.items()},
    }


def _grid(
    world: World, concepts: Sequence[int], shown: dict[tuple[bool, ...], Tensor], count: int = 8
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


def _report(config: EvaluateConfig, plugins: PluginFilesConfig, result: dict[str, Any]) -> str:
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
        "",
        "![rows concepts, columns plug-ins](grid.png)",
    ]
    for title, rows in (
        ("Chinese prompts through the branch", "rows"),
        ("English prompts, bare backbone", "english"),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| on | content | checkpoint | lora | controlnet | embedding |",
            "|---|---|---|---|---|---|",
        ]
        for row in result[rows]:
            cells = " | ".join(f"{row[key]:.3f}" for key in ("content", *NAMES))
            lines.append(f"| {' + '.join(row['on']) or 'none'} | {cells} |")
    lines += ["", "| ratio | value |", "|---|---|", *(f"| {key} | {result[key]} |" for key in REACH), ""]
    return "\n".join(lines)
