"""The prompts of a call, read: what each picture is told in each step, and which can be drawn together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError, printable, quoted
from ..method.condition import NativeCondition, Part, Stage
from ..method.step_texts import StepTexts
from ..plugins import Plugins
from ..speed.approximate import Approximation
from ..text.grammar import Notice
from ..text.pairs import TextPairs
from ..text.routing import route
from ..text.rules import PromptRules
from ..text.script import PictureScript, Script, StagedFeatures, StagedPairs, read_script
from .groups import as_count

logger = logging.getLogger("bdm")


@dataclass(frozen=True)
class Prompts:
    """What P prompts are told in both languages.

    Attributes:
        native: texts with their negatives, or features.
        english: likewise.
        scripts: of each prompt.
    """

    native: TextPairs
    english: TextPairs
    scripts: Sequence[PictureScript]

    def take(self, chosen: Sequence[int]) -> ChosenPrompts:
        """Some of the prompts, of one structure."""
        scripts = [self.scripts[i] for i in chosen]
        return ChosenPrompts(
            StagedPairs.of(self.native.take(chosen), scripts, native=True),
            StagedPairs.of(self.english.take(chosen), scripts, native=False),
            scripts[0],
        )


@dataclass(frozen=True)
class ChosenPrompts:
    """Prompts of one structure, which are drawn together.

    Attributes:
        native: what they say in each step.
        english: likewise.
        script: of one of them, whose structure is that of all.
    """

    native: StagedPairs
    english: StagedPairs
    script: PictureScript

    @property
    def joined(self) -> bool:
        """Whether AND joins prompts, or the only one has a weight."""
        return self.script.weights != (1.0,)

    def parts(self, of: Callable[[], Sequence[Part]]) -> Callable[[], Sequence[Part]]:
        """What the parts of the UNet's batch are, given those that the pipeline stacks."""
        return lambda: (*of(), *range(1, len(self.script.weights)))

    def strengths(self, given: Any) -> Any:
        """Strengths of plug-ins for a call: those that are given, and those of adapters that are named."""
        return {**(given or {}), **self.script.strengths} if self.script.strengths else given

    def check(
        self, guided: bool, english_ratio: float | None, approximation: Approximation, control: Any
    ) -> None:
        """Refuse what joined prompts cannot be drawn with.

        Args:
            guided: whether the pipeline uses guidance.
            english_ratio: of composed guidance.
            approximation: what is left out.
            control: the ControlNet of a stock ControlNet pipeline, if any.

        Raises:
            UserError: names it.
        """
        if not self.joined:
            return
        what = "AND joins prompts" if len(self.script.weights) > 1 else "the prompt has a weight behind it"
        if not guided:
            raise UserError(f"{what}, which weighs differences of guidance; give a guidance_scale above 1")
        interval = (approximation.guidance_start, approximation.guidance_end) != (0.0, 1.0)
        if english_ratio is not None or interval:
            other = "english_guidance" if english_ratio is not None else "a guidance interval"
            raise UserError(f"{what}, and {other} is asked for; leave one of them out")
        several = self.script.english is not None and len(self.script.english.weights) > 1
        if control is not None and several:
            raise UserError(
                "AND joins English prompts, and the pipeline's own ControlNet reads one alone; attach it as a"
                " plug-in: pipe.plugins.attach(file)"
            )

    def condition(self, features: StagedFeatures, **settings: Any) -> NativeCondition:
        """What the branch is told."""
        rows = zip(self.script.ends, features.positive, features.negative, strict=True)
        stages = tuple(Stage(*row) for row in rows)
        first = stages[0]
        return NativeCondition(
            first.positive[0],
            first.negative,
            **settings,
            stages=() if self.native.one is not None else stages,
        )

    def step_texts(
        self, features: StagedFeatures, images: int, steps: Any, constant: bool
    ) -> StepTexts | None:
        """What changes the UNet's texts from step to step; None where nothing does.

        Args:
            features: that the UNet reads.
            images: pictures of each prompt.
            steps: gives the pipeline's timesteps.
            constant: the features are the same in all stages.
        """
        if constant and not self.joined:
            return None
        return StepTexts(
            self.script.ends, self.script.weights, features.positive, features.negative, images, steps
        )


def read_prompts(
    native: TextPairs,
    english: TextPairs,
    steps: int,
    rules: PromptRules,
    plugins: Plugins,
    routed: bool,
    native_rules: PromptRules | None = None,
) -> Prompts:
    """Read the texts of a call.

    Args:
        native: with their negatives, or features.
        english: likewise.
        steps: of the drawing.
        rules: how they are read.
        plugins: whose names and words prompts may hold.
        routed: whether the pipeline has an English text encoder that words could be told.
        native_rules: how native ones are read where that differs.

    Raises:
        UserError: the languages join other numbers of prompts, or an adapter is named that is not attached.
    """
    if _routes(rules) and routed:
        native, english = _routed(native, english, _words(plugins))
    four = [
        _read(side, steps, by, pairs is native, side is pairs.positive)
        for pairs, by in ((native, native_rules or rules), (english, rules))
        for side in (pairs.positive, pairs.negative)
    ]
    scripts = [PictureScript(*(side[i] for side in four)) for i in range(len(native))]
    for script in scripts:
        _check_adapters(script.strengths, plugins)
    return Prompts(native, english, scripts)


def told(prompt: str, prompt_en: str, rules: PromptRules, plugins: Plugins) -> tuple[str, str]:
    """What branch and backbone are told of a native prompt and an English one.

    Args:
        prompt: as somebody wrote it.
        prompt_en: likewise.
        rules: how they are read.
        plugins: whose words prompts may hold.
    """
    if not _routes(rules):
        return prompt, prompt_en
    moved = route(prompt, prompt_en, _words(plugins))
    return moved.native, moved.english


def step_count(inputs: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> int:
    """How many steps a stock pipeline takes; a picture to start from leaves out the first.

    Args:
        inputs: of the call.
        known: the inputs that the stock pipeline takes.
    """
    asked = {name: one.default for name, one in known.items() if one.default is not one.empty}
    asked.update(inputs)
    given = next((asked[name] for name in ("timesteps", "sigmas") if asked.get(name) is not None), None)
    steps = as_count(asked.get("num_inference_steps"), "num_inference_steps") if given is None else len(given)
    strength = asked.get("strength")
    return max(1, min(int(steps * strength), steps)) if isinstance(strength, int | float) else steps


def _read(
    side: list[str] | Tensor, steps: int, rules: PromptRules, native: bool, positive: bool
) -> Sequence[Script | None]:
    """The scripts of one side of a language, none where features are given; each text is read once."""
    if isinstance(side, Tensor):
        return [None] * len(side)
    known = {text: read_script(text, steps, rules, native, composed=positive) for text in dict.fromkeys(side)}
    for text, script in known.items():
        for notice in script.notices:
            say(text, notice)
    return [known[text] for text in side]


def say(prompt: str, notice: Notice) -> None:
    """Tell of something in a prompt that its author may have meant otherwise."""
    logger.warning("prompt %s, %s", quoted(printable(prompt), 40), notice)


def _routes(rules: PromptRules) -> bool:
    return rules.routing and rules.emphasis == "a1111"


def _words(plugins: Plugins) -> list[str]:
    return [word for plugin in plugins for word in plugin.words]


def _routed(native: TextPairs, english: TextPairs, words: Sequence[str]) -> tuple[TextPairs, TextPairs]:
    """The same texts, with the words that belong on the English side there."""
    sides = [
        _side_routed(ours, theirs, words)
        for ours, theirs in ((native.positive, english.positive), (native.negative, english.negative))
    ]
    return TextPairs(sides[0][0], sides[1][0]), TextPairs(sides[0][1], sides[1][1])


def _side_routed(native: Any, english: Any, words: Sequence[str]) -> tuple[Any, Any]:
    if isinstance(native, Tensor) or isinstance(english, Tensor):
        return native, english
    routed = [route(ours, theirs, words) for ours, theirs in zip(native, english, strict=True)]
    for line in dict.fromkeys(each.line for each in routed if each.moved):
        logger.warning("%s", line)
    return [each.native for each in routed], [each.english for each in routed]


def _check_adapters(strengths: Mapping[str, Any], plugins: Plugins) -> None:
    for name in strengths:
        if name not in plugins or plugins[name].kind != "adapter":
            attached = ", ".join(plugin.name for plugin in plugins if plugin.kind == "adapter")
            raise UserError(
                f"the prompt names the adapter {quoted(name)}, and attached are {attached or 'none'}; attach"
                f" it first: pipe.plugins.attach(file, name={quoted(name)})"
            )
