"""Trials: prompts, what each must show, and how often the judge agrees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..emoji.judge import JudgeModel
from ..emoji.world import COLOUR_NAMES, Language, World
from .shares import Share


@dataclass(frozen=True)
class Trial:
    """N prompts drawn under one condition.

    Attributes:
        name: key of the result.
        title: what it shows, for the report.
        native: N native prompts.
        english: N English prompts.
        concepts: N concept indices the pictures must show.
        colours: N background colours they must have, or None where the prompt names none.
        branch_scale: 0 for the bare backbone.
        branch: ``"own"``, or ``"shuffled"`` for the control.
        english_guidance: strength of the English prompts apart; None where both languages pull together.
    """

    name: str
    title: str
    native: list[str]
    english: list[str]
    concepts: list[int]
    colours: list[str] | None = None
    branch_scale: float = 1.0
    branch: str = "own"
    english_guidance: float | None = None


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] of a trial's pictures.

    Attributes:
        concept: right concept (top-1 among all).
        colour: right background, or None.
        both: concept and background right, or None.
        openmoji: drawn in OpenMoji's look, the Chinese world's for the concepts seen differently.
        hits: (N,) bool, right in all that the prompt asked for.
        looks: (N,) bool, drawn in OpenMoji's look.
    """

    concept: Share
    colour: Share | None
    both: Share | None
    openmoji: Share
    hits: Tensor
    looks: Tensor


def make_trials(world: World, controls: int, seed: int, english_guidance: float | None = None) -> list[Trial]:
    """The evaluation's trials.

    ``controls`` concepts, drawn by ``seed``, serve the controls and the mixed prompts, which are drawn with
    both languages pulling together and, where ``english_guidance`` is given, each with a strength of its own.
    """
    everything = range(len(world.concepts))
    everyday = [i for i in everything if world.concepts[i].group != "native"]
    different = [i for i in everything if world.concepts[i].group == "different"]
    generator = random.Random(seed)
    some = sorted(generator.sample(everyday, min(controls, len(everyday))))
    colours = [generator.choice(COLOUR_NAMES) for _ in some]
    pairs = sorted(world.held_out)
    seen = _seen_pairs(world, generator)

    def chinese(concepts: Sequence[int]) -> list[str]:
        return [world.caption(i, None, "zh") for i in concepts]

    def english(concepts: Sequence[int]) -> list[str]:
        return [world.caption(i, None, "en") for i in concepts]

    def silent(prompts: Sequence[object]) -> list[str]:
        return [""] * len(prompts)

    backgrounds = [world.caption(None, c, "en") for c in colours]
    mixed = Trial(
        "mixed",
        "Concept in Chinese through the branch, background in English through the backbone",
        chinese(some),
        backgrounds,
        some,
        colours,
    )
    composed = replace(
        mixed,
        name="mixed_composed",
        title=f"{mixed.title}, English guidance {english_guidance} apart",
        english_guidance=english_guidance,
    )
    return [
        Trial(
            "chinese",
            "Chinese prompts, all concepts",
            chinese(everything),
            silent(everything),
            list(everything),
        ),
        Trial(
            "held_out",
            "Chinese prompts, concept-colour pairs never seen together",
            [world.caption(i, c, "zh") for i, c in pairs],
            silent(pairs),
            [i for i, _ in pairs],
            [c for _, c in pairs],
        ),
        Trial(
            "trained_pairs",
            "Chinese prompts, the same concepts with a colour seen in training",
            [world.caption(i, c, "zh") for i, c in seen],
            silent(seen),
            [i for i, _ in seen],
            [c for _, c in seen],
        ),
        Trial(
            "english",
            "English prompts, backbone without branch",
            silent(everyday),
            english(everyday),
            everyday,
            branch_scale=0,
        ),
        Trial(
            "english_different",
            "English prompts, concepts seen differently, backbone without branch",
            silent(different),
            english(different),
            different,
            branch_scale=0,
        ),
        Trial(
            "scale_0",
            "Control: Chinese prompts, branch scale 0",
            chinese(some),
            silent(some),
            some,
            branch_scale=0,
        ),
        Trial(
            "shuffled",
            "Control: branch trained on shuffled captions",
            chinese(some),
            silent(some),
            some,
            branch="shuffled",
        ),
        Trial("empty", 'Control: Chinese prompt ""', silent(some), silent(some), some),
        Trial(
            "background",
            "English prompts that name a background alone, backbone without branch",
            silent(some),
            backgrounds,
            some,
            colours,
            branch_scale=0,
        ),
        mixed,
        *([composed] if english_guidance is not None else []),
    ]


def _seen_pairs(world: World, generator: random.Random) -> list[tuple[int, str]]:
    """For every pair that is held out, its concept with another colour."""
    return [
        (i, generator.choice([c for c in COLOUR_NAMES if (i, c) not in world.held_out]))
        for i, _ in sorted(world.held_out)
    ]


def sweep_trials(world: World, count: int, seed: int, language: Language = "zh") -> list[Trial]:
    """Concepts alone and pairs seen in training, on which a guidance scale can be chosen without looking at
    what is reported.
    """
    generator = random.Random(f"sweep {seed}")
    everything = [
        (i, c) for i in range(len(world.concepts)) for c in COLOUR_NAMES if (i, c) not in world.held_out
    ]
    pairs = sorted(generator.sample(everything, min(count, len(everything))))
    concepts = sorted(generator.sample(range(len(world.concepts)), min(count, len(world.concepts))))
    alone, coloured = (
        [world.caption(i, c, language) for i, c in some] for some in ([(i, None) for i in concepts], pairs)
    )
    return [
        Trial("sweep_concepts", "Prompts, concepts alone", alone, [""] * len(alone), concepts),
        Trial(
            "sweep_pairs", "Prompts, pairs seen in training", coloured, [""] * len(coloured),
            [i for i, _ in pairs], [c for _, c in pairs],
        ),
    ]  # fmt: skip


def draw(
    pipe: Any, trial: Trial, steps: int, guidance: float, batch: int, seed: int,
    control_images: Sequence[Image.Image] | None = None, **call: Any,
) -> Tensor:  # fmt: skip
    """Pictures of a trial: (N, 3, H, W) in [-1, 1].

    Picture i uses seed + i, and the i-th control picture where there are any.

    ``call`` goes to the pipeline as it is.
    """
    pictures = []
    for start in tqdm(range(0, len(trial.native), batch), desc=trial.name, mininterval=2):
        part = slice(start, start + batch)
        images = pipe(
            trial.native[part],
            prompt_en=trial.english[part],
            branch_scale=trial.branch_scale,
            english_guidance=trial.english_guidance,
            seed=seed + start,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            control_images=list(control_images[part]) if control_images is not None else None,
            **call,
        ).images
        pictures.append(images * 2 - 1)
    return torch.cat(pictures)


@torch.no_grad()
def score(judge: JudgeModel, pictures: Tensor, trial: Trial) -> Score:
    """What the judge says of a trial's pictures."""
    verdict = judge(pictures.float())
    concept = verdict.concept.argmax(1) == torch.tensor(trial.concepts)
    looks = verdict.look.argmax(1) == 1
    if trial.colours is None:
        return Score(Share.of(concept), None, None, Share.of(looks), concept, looks)
    colour = verdict.colour.argmax(1) == torch.tensor([COLOUR_NAMES.index(c) for c in trial.colours])
    both = concept & colour
    return Score(Share.of(concept), Share.of(colour), Share.of(both), Share.of(looks), both, looks)
