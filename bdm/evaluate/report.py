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
from .setup import below_reach, open_evaluation, write_result
from .trials import Score, Trial, draw, make_trials, score, sweep_trials

#: Figures below these are named in the report.
REACH = {
    "chinese_top1": 0.90,
    "native_top1": 0.85,
    "held_out_pairs": 0.80,
    "native_look": 0.85,
    "judge_concept": 0.98,
}

#: Pictures of the guidance sweep share no seed with those of the figures.
SWEEP_SEED = 100_000


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run all trials and write ``report.md``, ``result.json`` and the grids into ``config.out``.

    Returns:
        The figures, as printed.
    """
    opened = open_evaluation(config)
    world, judge, pipe = opened.world, opened.judge, opened.pipe
    branches = {"own": pipe.branch}
    if config.shuffled_branch:
        branches["shuffled"] = BranchModel.from_pretrained(
            config.shuffled_branch, torch_dtype=torch.float32
        ).eval()
    figures: dict[str, Any] = judge_accuracy(judge, world, pipe.vae)
    rows: list[tuple[Trial, Score]] = []
    sweep = {
        guidance: [
            score(
                judge,
                draw(pipe, trial, config.steps, guidance, config.batch, config.seed + SWEEP_SEED),
                trial,
            )
            for trial in sweep_trials(world, config.controls, config.seed)
        ]
        for guidance in config.guidance_sweep
    }
    for trial in make_trials(world, config.controls, config.seed):
        if trial.branch not in branches:
            continue
        pipe.branch = branches[trial.branch]
        pictures = draw(pipe, trial, config.steps, config.guidance, config.batch, config.seed)
        result = score(judge, pictures, trial)
        rows.append((trial, result))
        save_picture(trial_grid(trial, result, pictures), config.out / f"{trial.name}.png")
        if trial.name == "chinese":
            figures |= _chinese_figures(judge, pictures, world, result)
    figures |= _trial_figures({trial.name: result for trial, result in rows})
    figures["chance"] = 1 / len(world.concepts)
    for guidance, (alone, pairs) in sweep.items():
        figures |= {
            f"guidance_{guidance:g}_concepts": alone.concept,
            f"guidance_{guidance:g}_pairs": pairs.both,
        }
    figures = {key: round(value, 4) for key, value in figures.items()}
    write_result(config.out, figures, _report(config, figures, rows, sweep))
    return figures


@torch.no_grad()
def judge_accuracy(judge: JudgeModel, world: World, vae: Any, count: int = 2560) -> dict[str, float]:
    """The judge's own accuracy.

    On fresh augmentations of real pictures, and on their VAE reconstructions (the ceiling).
    """
    source = EmojiSource(
        world, size=judge.config["size"], looks=LOOKS, treatments=judge.config["treatments"], held_out="all"
    )
    batch = fixed_batch(source, count, seed=-12345)
    assert batch.pixels is not None
    rows = [source.rows[i] for i in batch.indices]
    real = to_unit_range(batch.pixels)
    figures = {}
    verdict = judge(judge.augment(real, batch.generators))
    labels = row_labels(rows, source.treatments)
    for name, label in labels.items():
        figures[f"judge_{name}"] = _accuracy(getattr(verdict, name), label)
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in real.split(128)])
    figures["judge_concept_reconstructed"] = _accuracy(judge(decoded).concept, labels["concept"])
    return figures


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def _chinese_figures(judge: JudgeModel, pictures: Tensor, world: World, result: Score) -> dict[str, float]:
    """Figures of the groups of concepts within the Chinese trial."""
    native = torch.tensor([c.group == "native" for c in world.concepts])
    different = torch.tensor([c.group == "different" for c in world.concepts])
    with torch.no_grad():
        openmoji = judge(pictures[different].float()).look.argmax(1) == 1
    return {
        "chinese_top1": result.concept,
        "native_top1": result.hits[native].float().mean().item(),
        "native_look": openmoji.float().mean().item(),
    }


def _trial_figures(results: dict[str, Score]) -> dict[str, float]:
    picked = {
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
    rows: list[tuple[Trial, Score]],
    sweep: dict[float, list[Score]],
) -> str:
    lines = [
        "# Evaluation",
        "",
        (
            f"Model `{config.model}`, judge `{config.judge}`, {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, guidance {config.guidance}, seed {config.seed}."
        ),
        f"Chance is {figures['chance']:.4f}. {below_reach(figures, REACH)}",
        "",
        "| trial | prompts | concept | background | both | OpenMoji look |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial, result in rows:
        cells = [
            f"{v:.3f}" if v is not None else ""
            for v in (result.concept, result.colour, result.both, result.openmoji)
        ]
        lines.append(f"| {trial.title} | {len(trial.native)} | {' | '.join(cells)} |")
    if sweep:
        lines += [
            "",
            (
                f"Guidance, chosen where the mean of both is highest: {config.controls} concepts alone and"
                f" {config.controls} pairs seen in training, with other seeds than the figures'."
            ),
            "",
            "| guidance | concepts alone | pairs | mean |",
            "| --- | --- | --- | --- |",
        ]
        for guidance, (alone, pairs) in sweep.items():
            mean = (alone.concept + (pairs.both or 0.0)) / 2
            lines.append(f"| {guidance:g} | {alone.concept:.3f} | {pairs.both or 0.0:.3f} | {mean:.3f} |")
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
