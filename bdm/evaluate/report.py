"""``bdm evaluate``: the trials, their figures in one JSON line, and a report with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluateConfig
from ..data.batch import fixed_batch
from ..data.source import to_pixels, to_unit_range
from ..drawing.grid import labelled_grid, save_picture
from ..emoji.judge import JudgeModel
from ..emoji.world import LOOKS, EmojiSource, World
from ..method.branch import BranchModel
from ..training.recipes.judge import row_labels
from .guidance import Sweeps, choose, sweep_lines
from .setup import below_reach, open_evaluation, write_result
from .shares import Share, flat_figures
from .trials import Score, Trial, draw, make_trials, score

#: Figures below these are named in the report.
REACH = {
    "chinese_top1": 0.93,
    "native_top1": 0.92,
    "held_out_pairs": 0.90,
    "native_look": 0.95,
    "mixed_both": 0.75,
    "english_top1": 0.93,
    "judge_concept": 0.98,
}

#: Real pictures that are judged, or decoded, at once.
AT_ONCE = 128
#: Real pictures by which a judge's own accuracy is told.
JUDGED = 2560


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run all trials and write ``report.md``, ``result.json`` and the grids into ``config.out``.

    Returns:
        The figures, as printed.
    """
    opened = open_evaluation(config)
    world, pipe = opened.world, opened.pipe
    branches = {"own": pipe.branch}
    if config.shuffled_branch:
        branches["shuffled"] = BranchModel.from_pretrained(
            config.shuffled_branch, torch_dtype=torch.float32
        ).eval()
    judged = {prefix: judge_accuracy(judge, world, pipe.vae) for prefix, judge in opened.judges.items()}
    reported = make_trials(world, config.controls, config.seed, None, config.pictures)
    config, sweeps = choose(opened, config, reported)
    rows: list[tuple[Trial, dict[str, Score]]] = []
    trials = make_trials(world, config.controls, config.seed, config.english_guidance, config.pictures)
    for trial in trials:
        if trial.branch not in branches:
            continue
        pipe.branch = branches[trial.branch]
        pictures = draw(pipe, trial, config.steps, config.guidance, config.batch, config.seed)
        scores = {prefix: score(judge, pictures, trial) for prefix, judge in opened.judges.items()}
        rows.append((trial, scores))
        save_picture(trial_grid(trial, scores[""], pictures), config.out / f"{trial.name}.png")
    figures: dict[str, Any] = {}
    for prefix, accuracy in judged.items():
        results = {trial.name: scores[prefix] for trial, scores in rows}
        figures |= flat_figures({**accuracy, **trial_figures(results)}, prefix)
    figures["chance"] = round(1 / len(world.concepts), 4)
    figures["guidance"] = config.guidance
    if config.english_guidance is not None:
        figures["english_guidance"] = config.english_guidance
    for guidance, (alone, pairs) in sweeps.guidance.items():
        assert pairs.both is not None
        shares = {
            f"guidance_{guidance:g}_concepts": alone.concept,
            f"guidance_{guidance:g}_pairs": pairs.both,
        }
        figures |= flat_figures(shares)
    write_result(config.out, figures, _report(config, figures, rows, sweeps))
    return figures


@torch.no_grad()
def judge_accuracy(judge: JudgeModel, world: World, vae: Any) -> dict[str, Share]:
    """The judge's own accuracy.

    On fresh augmentations of real pictures, and on their VAE reconstructions (the ceiling).
    """
    source = EmojiSource(
        world, size=judge.config["size"], looks=LOOKS, treatments=judge.config["treatments"], held_out="all"
    )
    batch = fixed_batch(source, JUDGED, seed=-12345)
    assert batch.pixels is not None
    rows = [source.rows[i] for i in batch.indices]
    real = to_unit_range(batch.pixels)
    labels = row_labels(rows, source.treatments)
    seen = judge.augment(real, batch.generators)
    decoded = [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in real.split(AT_ONCE)]
    said = [judge(x) for x in seen.split(AT_ONCE)]
    figures = {
        f"judge_{name}": _accuracy(torch.cat([getattr(verdict, name) for verdict in said]), label)
        for name, label in labels.items()
    }
    reconstructed = torch.cat([judge(x).concept for x in decoded])
    return {**figures, "judge_concept_reconstructed": _accuracy(reconstructed, labels["concept"])}


def _accuracy(logits: Tensor, labels: Tensor) -> Share:
    return Share.of(logits.argmax(1) == labels)


def trial_figures(results: dict[str, Score]) -> dict[str, Share]:
    """The figures of the trials that there are, by name."""
    picked = {
        "chinese_top1": ("chinese", "concept"),
        "native_top1": ("native", "concept"),
        "native_look": ("different", "openmoji"),
        "held_out_pairs": ("held_out", "both"),
        "trained_pairs": ("trained_pairs", "both"),
        "english_top1": ("english", "concept"),
        "english_look": ("english_different", "openmoji"),
        "control_scale_0_top1": ("scale_0", "concept"),
        "control_shuffled_top1": ("shuffled", "concept"),
        "control_empty_top1": ("empty", "concept"),
        "mixed_concept": ("mixed", "concept"),
        "mixed_colour": ("mixed", "colour"),
        "mixed_both": ("mixed", "both"),
        "composed_concept": ("mixed_composed", "concept"),
        "composed_colour": ("mixed_composed", "colour"),
        "composed_both": ("mixed_composed", "both"),
        "english_background": ("background", "colour"),
    }
    return {key: getattr(results[name], field) for key, (name, field) in picked.items() if name in results}


def trial_grid(trial: Trial, result: Score, pictures: Tensor, count: int = 40) -> Any:
    """Evenly spread pictures of a trial, each with its prompt and the judge's verdict."""
    chosen = range(0, len(trial.native), max(1, -(-len(trial.native) // count)))
    labels = [
        f"{'✓' if result.hits[i] else '×'}"
        f" {' + '.join(t for t in (trial.native[i], trial.english[i]) if t) or '(empty)'}"
        for i in chosen
    ]
    return labelled_grid(to_pixels(pictures[list(chosen)]), labels, columns=8, scale=3)


def _report(
    config: EvaluateConfig,
    figures: dict[str, float],
    rows: list[tuple[Trial, dict[str, Score]]],
    sweeps: Sweeps,
) -> str:
    judges = " and `".join(
        [f"{config.judge}`", *([f"{config.second_judge}`"] if config.second_judge else [])]
    )
    lines = [
        "# Evaluation",
        "",
        (
            f"Model `{config.model}`, judge {judges}, {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, guidance {config.guidance}, seed {config.seed}."
            " Shares with their standard errors; in brackets what the second judge says."
        ),
        f"Chance is {figures['chance']:.4f}. {below_reach(figures, REACH)}",
        "",
        "| trial | prompts | concept | background | both | OpenMoji look |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial, scores in rows:
        cells = [judged_share(scores, name) for name in ("concept", "colour", "both", "openmoji")]
        lines.append(f"| {trial.title} | {len(trial.native)} | {' | '.join(cells)} |")
    lines += sweep_lines(config, sweeps)
    lines += [
        "",
        "| figure | value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in figures.items()),
        "",
    ]
    for trial, _ in rows:
        lines += [f"## {trial.title}", "", f"![{trial.name}]({Path(trial.name + '.png')})", ""]
    return "\n".join(lines)


def judged_share(scores: dict[str, Score], name: str) -> str:
    """A share as the first judge says, with the second's in brackets."""
    shares = [getattr(result, name) for result in scores.values()]
    if shares[0] is None:
        return ""
    return str(shares[0]) + "".join(f" ({share.value:.3f})" for share in shares[1:])
