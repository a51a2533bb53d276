"""How strongly prompts pull, chosen on other prompts and with other seeds than those of the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..config import EvaluateConfig
from ..emoji.words import Language
from .setup import Evaluation
from .trials import Score, Trial, draw, score, sweep_mixed, sweep_trials

#: Pictures of a sweep share no seed with those of the figures.
SWEEP_SEED = 100_000
#: Prompts of each kind for every value that is tried; enough to tell apart what matters.
SWEEP_PICTURES = 64


@dataclass(frozen=True)
class Sweeps:
    """What was tried, judged by the first judge.

    Attributes:
        guidance: guidance scale -> scores of concepts alone and of pairs seen in training.
        english: strength of the English prompts apart -> the score of prompts in two languages.
    """

    guidance: Mapping[float, list[Score]] = field(default_factory=dict)
    english: Mapping[float, Score] = field(default_factory=dict)

    @property
    def best_guidance(self) -> float:
        """Where the mean of concepts alone and of pairs is highest."""
        return max(self.guidance, key=lambda one: sum(_both(score) for score in self.guidance[one]))

    @property
    def best_english(self) -> float:
        """Where most pictures show both what the native and what the English prompt asked for."""
        return max(self.english, key=lambda one: _both(self.english[one]))


def _both(score: Score) -> float:
    return (score.both or score.concept).value


def choose(
    opened: Evaluation, config: EvaluateConfig, reported: Iterable[Trial], language: Language = "zh"
) -> tuple[EvaluateConfig, Sweeps]:
    """Try what the configuration wants tried and, if it says so, go on with what is best.

    Args:
        opened: what draws and who judges.
        config: ``guidance_sweep`` and ``english_guidance_sweep`` are tried; ``choose`` takes the best.
        reported: the trials of the figures, whose prompts are not tried.
        language: of the native prompts.

    Returns:
        The configuration to go on with, and what was tried.
    """
    known = {prompt for trial in reported for prompt in trial.prompts}
    trials = sweep_trials(opened.world, _count(config), config.seed, language, known)
    sweeps = Sweeps({one: _guided(opened, config, one, trials) for one in config.guidance_sweep})
    if config.choose:
        config = config.model_copy(update={"guidance": sweeps.best_guidance})
    mixed = sweep_mixed(opened.world, _count(config), config.seed, known)
    sweeps = replace(
        sweeps, english={one: _composed(opened, config, one, mixed) for one in config.english_guidance_sweep}
    )
    if config.choose and sweeps.english:
        config = config.model_copy(update={"english_guidance": sweeps.best_english})
    return config, sweeps


def _count(config: EvaluateConfig) -> int:
    return min(config.controls, SWEEP_PICTURES)


def _guided(
    opened: Evaluation, config: EvaluateConfig, guidance: float, trials: Sequence[Trial]
) -> list[Score]:
    seed = config.seed + SWEEP_SEED
    return [
        score(opened.judge, draw(opened.pipe, trial, config.steps, guidance, config.batch, seed), trial)
        for trial in trials
    ]


def _composed(opened: Evaluation, config: EvaluateConfig, english_guidance: float, mixed: Trial) -> Score:
    trial = replace(mixed, english_guidance=english_guidance)
    seed = config.seed + SWEEP_SEED
    pictures = draw(opened.pipe, trial, config.steps, config.guidance, config.batch, seed)
    return score(opened.judge, pictures, trial)


def sweep_lines(config: EvaluateConfig, sweeps: Sweeps) -> list[str]:
    """What was tried, in Markdown."""
    lines: list[str] = []
    if sweeps.guidance:
        lines += [
            "",
            f"Guidance, chosen where the mean of both is highest: {_count(config)} concepts alone and as many"
            " pairs seen in training, with other seeds than the figures'.",
            "",
            "| guidance | concepts alone | pairs | mean |",
            "| --- | --- | --- | --- |",
        ]
    for guidance, (alone, pairs) in sweeps.guidance.items():
        assert pairs.both is not None
        mean = (alone.concept.value + pairs.both.value) / 2
        lines.append(f"| {guidance:g} | {alone.concept} | {pairs.both} | {mean:.3f} |")
    if sweeps.english:
        lines += [
            "",
            f"English guidance, chosen where most of {_count(config)} other prompts in two languages are"
            " right in both.",
            "",
            "| English guidance | concept | background | both |",
            "| --- | --- | --- | --- |",
        ]
    for guidance, found in sweeps.english.items():
        lines.append(f"| {guidance:g} | {found.concept} | {found.colour} | {found.both} |")
    return lines
