"""Plug-ins together: combinations of four, scored for content and for each plug-in's own effect."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import EvaluateConfig, PluginFilesConfig
from ..data.source import to_pixels
from ..emoji.judge import JudgeModel
from ..emoji.world import COLOUR_NAMES, World, compose, load_drawing
from ..errors import UserError
from ..plugins.controlnet import canny_edges
from .setup import Evaluation
from .shares import Share
from .trials import Trial, draw

#: The four plug-ins, in the order they are attached.
NAMES = ("checkpoint", "lora", "controlnet", "embedding")

#: Which of the four are on.
Combination = tuple[bool, ...]
#: Content and the four effects of the pictures of one combination.
Figures = Mapping[str, Share]


@dataclass(frozen=True)
class Combined:
    """The prompts and pictures that all combinations share.

    Attributes:
        world: the concepts.
        plugins: the four.
        concepts: N of those that both worlds see alike.
        edges: N pictures for the ControlNet.
    """

    world: World
    plugins: PluginFilesConfig
    concepts: list[int]
    edges: list[Image.Image]

    @classmethod
    def of(cls, opened: Evaluation, config: EvaluateConfig, plugins: PluginFilesConfig) -> Combined:
        """Draw the concepts by the configuration's seed.

        Raises:
            UserError: a judge that does not know what the plug-ins draw.
        """
        _refuse_blind(opened, config)
        world = opened.world
        shared = [i for i, concept in enumerate(world.concepts) if concept.group == "shared"]
        concepts = sorted(random.Random(config.seed).sample(shared, min(config.controls, len(shared))))
        size = opened.size
        return cls(world, plugins, concepts, [edge_picture(world, i, size, config.seed) for i in concepts])

    def combinations(self) -> list[Combination]:
        """All sixteen, or those without which a ratio cannot be worked out; the smallest first."""
        every = sorted(product((False, True), repeat=len(NAMES)), key=sum)
        return [on for on in every if self.plugins.pairs or sum(on) != 2]

    def draw(self, pipe: Any, config: EvaluateConfig, on: Combination, native: bool) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] of one combination, in Chinese or on the bare backbone."""
        trial = self.trial(on, config.english_guidance, native)
        return draw_with(pipe, config, self.plugins, trial, self.edges, _names(on))

    def trial(self, on: Combination, english_guidance: float | None = None, native: bool = True) -> Trial:
        """What is asked for beside a combination (see ``combination_trial``)."""
        return combination_trial(
            self.world, self.concepts, self.plugins, _names(on), native, english_guidance
        )

    def measure(self, judge: JudgeModel, pictures: Tensor) -> Figures:
        """Content and effects of them."""
        return measure(judge, pictures, self.concepts, self.edges, self.plugins)

    def figures(
        self, pipe: Any, config: EvaluateConfig, judges: Mapping[str, JudgeModel], native: bool
    ) -> dict[str, dict[Combination, Figures]]:
        """The figures of all combinations, by judge; no picture is kept."""
        found: dict[str, dict[Combination, Figures]] = {prefix: {} for prefix in judges}
        for on in self.combinations():
            pictures = self.draw(pipe, config, on, native)
            for prefix, judge in judges.items():
                found[prefix][on] = self.measure(judge, pictures)
        return found


def _names(on: Combination) -> list[str]:
    return [name for name, wanted in zip(NAMES, on, strict=True) if wanted]


def _refuse_blind(opened: Evaluation, config: EvaluateConfig) -> None:
    for prefix, judge in opened.judges.items():
        known = judge.config["treatments"]
        if not {"outlined", "sealed", "outlined_sealed"} <= set(known):
            folder = config.second_judge if prefix else config.judge
            raise UserError(
                f"the judge in {folder} tells apart {', '.join(known)}; the plug-ins draw outlines and"
                " seals: train a judge that knows both with configs/emoji_64/judge.yaml"
            )


def edge_picture(world: World, concept: int, size: int, seed: int) -> Image.Image:
    """Edges of a real picture of a concept, mirrored, so that the concept's usual picture does not already
    have them.
    """
    drawing = load_drawing(world.concepts[concept].code, "twemoji").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return canny_edges(compose(drawing, "white", size, random.Random(f"{seed}/{concept}")))


def combination_trial(
    world: World,
    concepts: Sequence[int],
    plugins: PluginFilesConfig,
    chosen: Sequence[str],
    native: bool,
    english_guidance: float | None = None,
) -> Trial:
    """Concepts with the trigger words of the chosen plug-ins.

    Native prompts, or English ones without the branch. ``english_guidance`` weighs the trigger words beside
    native prompts (see ``Trial``).
    """
    trigger = Path(plugins.embedding).stem
    words = [
        word for name, word in (("lora", plugins.lora_trigger), ("embedding", trigger)) if name in chosen
    ]
    names = [world.caption(i, None, "zh" if native else "en") for i in concepts]
    english = [", ".join([*([] if native else [name]), *words]) for name in names]
    title = f"{' + '.join(chosen) or 'none'}, {'Chinese' if native else 'English'}"
    return Trial(
        title,
        title,
        names if native else [""] * len(names),
        english,
        [*concepts],
        branch_scale=float(native),
        english_guidance=english_guidance if native else None,
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

    def treated(how: str) -> Share:
        names = judge.config["treatments"]
        return Share.of(torch.tensor([how in names[i] for i in verdict.treatment.argmax(1)]))

    drawn = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in to_pixels(pictures)]
    agreement = [edge_agreement(canny_edges(p), e) for p, e in zip(drawn, edges, strict=True)]
    return {
        "content": Share.of(verdict.concept.argmax(1) == torch.tensor(concepts)),
        "checkpoint": treated("outlined"),
        "lora": treated("sealed"),
        # No share of pictures: its standard error is below that of one of this size.
        "controlnet": Share(float(np.mean(agreement)), len(agreement)),
        "embedding": Share.of(verdict.colour.argmax(1) == COLOUR_NAMES.index(plugins.embedding_colour)),
    }


def edge_agreement(drawn: Image.Image, given: Image.Image) -> float:
    """F1 of two edge pictures, pixel by pixel: in pictures this small, a pixel aside is another place."""
    ours, theirs = (np.asarray(p.convert("L")) > 127 for p in (drawn, given))
    return float(2 * (ours & theirs).sum() / max(1, ours.sum() + theirs.sum()))


def ratios(rows: Mapping[Combination, Figures], english: Mapping[Combination, Figures]) -> dict[str, Any]:
    """The worst ratios of what is kept beside the branch.

    Of one plug-in: content to content without it, and its effect to its effect on the bare backbone. Of all
    four: content and effects to what the bare backbone keeps with the same four and English prompts.

    An effect is what a plug-in adds to its own figure: with it, less without it, everything else being equal.
    """
    none, everything = (False,) * len(NAMES), (True,) * len(NAMES)
    singles = {name: tuple(name == other for other in NAMES) for name in NAMES}

    def effect(figures: Mapping[Combination, Figures], on: Combination, name: str) -> float:
        without = tuple(wanted and name != other for wanted, other in zip(on, NAMES, strict=True))
        return figures[on][name].value - figures[without][name].value

    def content(figures: Mapping[Combination, Figures], on: Combination) -> float:
        return figures[on]["content"].value

    def ratio(own: float, reference: float) -> float:
        return own / reference if reference > 0 else 0.0

    contents = {name: ratio(content(rows, on), content(rows, none)) for name, on in singles.items()}
    effects = {name: ratio(effect(rows, on, name), effect(english, on, name)) for name, on in singles.items()}
    together = {
        name: ratio(effect(rows, everything, name), effect(english, everything, name)) for name in NAMES
    }
    return {
        "single_content_ratio": round(min(contents.values()), 4),
        "single_effect_ratio": round(min(effects.values()), 4),
        "all_content_ratio": round(ratio(content(rows, everything), content(english, everything)), 4),
        "all_effect_ratio": round(min(together.values()), 4),
        "all_content": round(content(rows, everything), 4),
        "content_ratios": {name: round(value, 4) for name, value in contents.items()},
        "effect_ratios": {name: round(value, 4) for name, value in effects.items()},
        "effect_ratios_together": {name: round(value, 4) for name, value in together.items()},
    }
