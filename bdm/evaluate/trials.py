"""Trials: prompts, what each must show, and how often the judge agrees."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..emoji.judge import JudgeModel
from ..emoji.world import COLOUR_NAMES, Language, World
from .shares import Share

#: What a picture is asked for: a native and an English text.
Prompt = tuple[str, str]


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

    @property
    def prompts(self) -> list[Prompt]:
        """The N pairs of a native and an English text."""
        return [*zip(self.native, self.english, strict=True)]


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


def make_trials(
    world: World, controls: int, seed: int, english_guidance: float | None = None, pictures: int = 0
) -> list[Trial]:
    """The evaluation's trials.

    ``controls`` concepts, drawn by ``seed``, serve the controls and the mixed prompts, which are drawn with
    both languages pulling together and, where ``english_guidance`` is given, each with a strength of its own.
    The native concepts and those seen differently are asked for as often as makes ``controls`` prompts at
    least. ``pictures`` is how many of all concepts, and of the pairs, are asked for at most; 0 means all.
    """
    everything = _some(range(len(world.concepts)), pictures, seed)
    native, different = (_group(world, group) for group in ("native", "different"))
    everyday = [i for i in range(len(world.concepts)) if world.concepts[i].group != "native"]
    generator = random.Random(seed)
    some = sorted(generator.sample(everyday, min(controls, len(everyday))))
    colours = [generator.choice(COLOUR_NAMES) for _ in some]
    seen = _some(_seen_pairs(world, generator), pictures, seed)
    backgrounds = [world.caption(None, c, "en") for c in colours]
    asked = _Asked(world)
    mixed = Trial(
        "mixed",
        "Concept in Chinese through the branch, background in English through the backbone",
        asked.names(some),
        backgrounds,
        some,
        colours,
    )
    trials = [
        asked.chinese("chinese", "Chinese prompts, all concepts", everything),
        asked.chinese(
            "native", "Chinese prompts, concepts that the English side never saw", _often(native, controls)
        ),
        asked.chinese("different", "Chinese prompts, concepts seen differently", _often(different, controls)),
        asked.pairs(
            "held_out",
            "Chinese prompts, concept-colour pairs never seen together",
            _some(sorted(world.held_out), pictures, seed),
        ),
        asked.pairs(
            "trained_pairs", "Chinese prompts, the same concepts with a colour seen in training", seen
        ),
        asked.english("english", "English prompts, backbone without branch", _some(everyday, pictures, seed)),
        asked.english(
            "english_different",
            "English prompts, concepts seen differently, backbone without branch",
            _often(different, controls),
        ),
        replace(
            asked.chinese("scale_0", "Control: Chinese prompts, branch scale 0 (an untrained branch)", some),
            branch_scale=0,
        ),
        replace(
            asked.chinese("shuffled", "Control: branch trained on shuffled captions", some),
            branch="shuffled",
        ),
        Trial("empty", 'Control: Chinese prompt ""', [""] * len(some), [""] * len(some), some),
        Trial(
            "background",
            "English prompts that name a background alone, backbone without branch",
            [""] * len(some),
            backgrounds,
            some,
            colours,
            branch_scale=0,
        ),
        mixed,
    ]
    return trials if english_guidance is None else [*trials, composed(mixed, english_guidance)]


def composed(trial: Trial, english_guidance: float) -> Trial:
    """A trial in two languages, each of which pulls with a strength of its own."""
    return replace(
        trial,
        name=f"{trial.name}_composed",
        title=f"{trial.title}, English guidance {english_guidance:g} apart",
        english_guidance=english_guidance,
    )


@dataclass(frozen=True)
class _Asked:
    """Writes trials in one language each."""

    world: World

    def names(self, concepts: Sequence[int], language: Language = "zh") -> list[str]:
        return [self.world.caption(i, None, language) for i in concepts]

    def chinese(self, name: str, title: str, concepts: Sequence[int]) -> Trial:
        return Trial(name, title, self.names(concepts), [""] * len(concepts), [*concepts])

    def english(self, name: str, title: str, concepts: Sequence[int]) -> Trial:
        texts = self.names(concepts, "en")
        return Trial(name, title, [""] * len(concepts), texts, [*concepts], branch_scale=0)

    def pairs(
        self, name: str, title: str, pairs: Sequence[tuple[int, str]], language: Language = "zh"
    ) -> Trial:
        texts = [self.world.caption(i, c, language) for i, c in pairs]
        concepts, colours = [i for i, _ in pairs], [c for _, c in pairs]
        return Trial(name, title, texts, [""] * len(pairs), concepts, colours)


def _group(world: World, group: str) -> list[int]:
    return [i for i, concept in enumerate(world.concepts) if concept.group == group]


def _some(everything: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many of a sequence in their order; 0 means all."""
    if not count or count >= len(everything):
        return [*everything]
    chosen = sorted(random.Random(f"some {seed}").sample(range(len(everything)), count))
    return [everything[i] for i in chosen]


def _often(concepts: list[int], count: int) -> list[int]:
    """All concepts, as often as makes so many at least; every picture has a seed of its own."""
    return concepts * max(1, -(-count // len(concepts)))


def _seen_pairs(world: World, generator: random.Random) -> list[tuple[int, str]]:
    """For every pair that is held out, its concept with another colour."""
    return [
        (i, generator.choice([c for c in COLOUR_NAMES if (i, c) not in world.held_out]))
        for i, _ in sorted(world.held_out)
    ]


def sweep_trials(
    world: World, count: int, seed: int, language: Language = "zh", reported: Collection[Prompt] = ()
) -> list[Trial]:
    """Concepts alone and pairs seen in training, on which a guidance scale can be chosen without looking at
    what is reported.

    Prompts that are ``reported`` are left out, as long as there are ``count`` others.
    """
    generator = random.Random(f"sweep {seed}")
    asked = _Asked(world)

    def some(prompts: dict[Any, str]) -> list[Any]:
        others = [key for key, text in prompts.items() if (text, "") not in reported]
        return sorted(generator.sample(others if len(others) >= count else [*prompts], count))

    named = [i for i, concept in enumerate(world.concepts) if language in concept.names]
    pairs = {
        (i, c): world.caption(i, c, language)
        for i in named
        for c in COLOUR_NAMES
        if (i, c) not in world.held_out
    }
    count = min(count, len(named))
    chosen = some(pairs)
    concepts = some({i: world.caption(i, None, language) for i in named})
    alone = asked.names(concepts, language)
    return [
        Trial("sweep_concepts", "Prompts, concepts alone", alone, [""] * len(alone), concepts),
        asked.pairs("sweep_pairs", "Prompts, pairs seen in training", chosen, language),
    ]


def sweep_mixed(world: World, count: int, seed: int, reported: Collection[Prompt] = ()) -> Trial:
    """Everyday concepts in Chinese with backgrounds in English, on which the English strength can be chosen
    without looking at what is reported; ``reported`` prompts are left out.
    """
    generator = random.Random(f"sweep mixed {seed}")
    prompts = {
        (i, c): (world.caption(i, None, "zh"), world.caption(None, c, "en"))
        for i, concept in enumerate(world.concepts)
        if concept.group != "native"
        for c in COLOUR_NAMES
    }
    others = [key for key, texts in prompts.items() if texts not in reported]
    chosen = sorted(generator.sample(others, min(count, len(others))))
    native, english = ([prompts[key][side] for key in chosen] for side in (0, 1))
    concepts, colours = [i for i, _ in chosen], [c for _, c in chosen]
    return Trial("sweep_mixed", "Prompts in two languages", native, english, concepts, colours)


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
