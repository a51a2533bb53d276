"""Which languages a branch understands.

Names in languages that were trained and in languages that were not, native concepts in all of them, and free
phrases that no caption has, beside a branch trained on shuffled captions.
"""

from __future__ import annotations

import random
from typing import Any

from ..config import EvaluateConfig, LanguagesConfig
from ..drawing.grid import save_picture
from ..emoji.phrases import read_phrases
from ..emoji.world import Language, World
from ..method.branch import BranchModel
from .guidance import Sweeps, choose, sweep_lines
from .report import judged_share, trial_grid
from .setup import below_reach, open_evaluation, write_result
from .shares import Share, flat_figures
from .trials import Score, Trial, draw, score

#: Figures below these are named in the report; the shuffled control is to be near chance.
REACH = {"trained_languages": 0.85, "never_trained_languages": 0.5, "phrases": 0.5}


def evaluate_languages(config: EvaluateConfig, languages: LanguagesConfig) -> dict[str, Any]:
    """Score names, native concepts and phrases.

    Writes ``report.md``, ``result.json`` and grids into ``config.out``.

    Returns:
        The figures, as printed.

    Raises:
        UserError: see ``open_evaluation`` and ``read_phrases``.
    """
    opened = open_evaluation(config)
    trials = language_trials(opened.world, languages, config.controls, config.seed)
    branches = {"": opened.pipe.branch}
    if config.shuffled_branch:
        branches["shuffled_"] = BranchModel.from_pretrained(config.shuffled_branch).float().eval()
    first = languages.trained[0] if languages.trained else "zh"
    config, sweeps = choose(opened, config, trials.values(), first)
    figures: dict[str, float] = {}
    tables: dict[str, dict[str, Score]] = {}
    for branch in branches:
        opened.pipe.branch = branches[branch]
        for name, trial in trials.items():
            if branch and name not in _controlled(languages):
                continue
            pictures = draw(opened.pipe, trial, config.steps, config.guidance, config.batch, config.seed)
            scores = {prefix: score(judge, pictures, trial) for prefix, judge in opened.judges.items()}
            tables[branch + name] = scores
            if not branch:
                save_picture(trial_grid(trial, scores[""], pictures), config.out / f"{name}.png")
    for prefix in opened.judges:
        shares = {name: scores[prefix].concept for name, scores in tables.items()}
        figures |= flat_figures(shares | _summaries(shares, languages), prefix)
    figures["chance"] = round(1 / len(opened.world.concepts), 4)
    figures["guidance"] = config.guidance
    write_result(config.out, figures, _report(config, languages, trials, tables, figures, sweeps))
    return figures


def language_trials(world: World, languages: LanguagesConfig, count: int, seed: int) -> dict[str, Trial]:
    """Trials by name.

    ``names_LANGUAGE`` of ``count`` concepts, ``native_LANGUAGE`` and ``phrases_LANGUAGE``.
    """
    every = range(len(world.concepts))
    some = sorted(random.Random(seed).sample(every, min(count, len(every))))
    native = [i for i in every if world.concepts[i].group == "native"]
    trials: dict[str, Trial] = {}

    def add(name: str, title: str, texts: list[str], concepts: list[int]) -> None:
        trials[name] = Trial(name, title, texts, [""] * len(texts), concepts)

    def names(kind: str, language: Language, concepts: list[int]) -> None:
        named = [i for i in concepts if language in world.concepts[i].names]
        said = "trained" if language in languages.trained else "never trained"
        add(
            f"{kind}_{language}",
            f"{'Names' if kind == 'names' else 'Names of native concepts'}, {language} ({said})",
            [world.caption(i, None, language) for i in named],
            named,
        )

    for language in (*languages.trained, *languages.never):
        names("names", language, some)
        names("native", language, native)
    for language in languages.phrases:
        phrases = read_phrases(world, (language,))
        texts, concepts = [p.text for p in phrases], [p.concept for p in phrases]
        add(f"phrases_{language}", f"Free phrases, {language}", texts, concepts)
    return trials


def _controlled(languages: LanguagesConfig) -> set[str]:
    """The trials that the shuffled branch is asked for."""
    return {f"names_{language}" for language in languages.trained[:1]}


def _summaries(shares: dict[str, Share], languages: LanguagesConfig) -> dict[str, Share]:
    """Shares over all pictures of a kind."""
    kinds = {
        "trained_languages": [f"names_{language}" for language in languages.trained],
        "never_trained_languages": [f"names_{language}" for language in languages.never],
        "native_trained": [f"native_{language}" for language in languages.trained],
        "native_never_trained": [f"native_{language}" for language in languages.never],
        "phrases": [f"phrases_{language}" for language in languages.phrases],
    }
    return {kind: Share.over([shares[name] for name in names]) for kind, names in kinds.items() if names}


def _report(
    config: EvaluateConfig,
    languages: LanguagesConfig,
    trials: dict[str, Trial],
    tables: dict[str, dict[str, Score]],
    figures: dict[str, float],
    sweeps: Sweeps,
) -> str:
    lines = [
        "# Languages",
        "",
        (
            f"Model `{config.model}`, branch `{config.branch or 'its own'}`, {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, guidance {config.guidance}, seed {config.seed}."
            " Top-1 of the concept with its standard error; in brackets what the second judge says."
        ),
        f"Trained: {', '.join(languages.trained) or 'none'}. Never: {', '.join(languages.never) or 'none'}."
        f" Chance is {figures['chance']:.4f}. {below_reach(figures, REACH)}",
        *sweep_lines(config, sweeps),
        "",
        "| trial | prompts | concept |",
        "| --- | --- | --- |",
    ]
    for name, scores in tables.items():
        trial = trials[name.removeprefix("shuffled_")]
        control = "Control, shuffled captions: " if name.startswith("shuffled_") else ""
        said = judged_share(scores, "concept")
        lines.append(f"| {control}{trial.title} | {len(trial.native)} | {said} |")
    lines += ["", "| figure | value |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in figures.items()]
    for name in trials:
        lines += ["", f"## {trials[name].title}", "", f"![{name}]({name}.png)"]
    return "\n".join([*lines, ""])
