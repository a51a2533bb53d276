"""What a picture's four texts say over the steps of its drawing: read, resolved, and put side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError, quoted
from .grammar import Lora, Notice
from .pairs import TextPairs, TextsOrFeatures
from .reader import read_prompt
from .rules import PromptRules
from .schedule import last_steps, said_in


@dataclass(frozen=True)
class Script:
    """What one text says.

    Attributes:
        ends: the last step, from 1, of each of its stages.
        said: by stage and by the parts that AND joins.
        weights: of the parts.
        loras: the adapters that it names.
        notices: what may have been meant otherwise.
    """

    ends: tuple[int, ...]
    said: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...] = (1.0,)
    loras: tuple[Lora, ...] = ()
    notices: tuple[Notice, ...] = ()

    def in_step(self, step: int) -> tuple[str, ...]:
        """What each part says in a step."""
        stage = next((i for i, end in enumerate(self.ends) if step <= end), len(self.ends) - 1)
        return self.said[stage]


def read_script(
    text: str, steps: int, rules: PromptRules, native: bool = False, composed: bool = True
) -> Script:
    """Read a prompt for a drawing.

    Args:
        text: the prompt.
        steps: of the drawing.
        rules: by the official ones nothing is scheduled, joined or taken out.
        native: full-width marks are syntax.
        composed: AND and weights are syntax, which they are not in negative prompts.
    """
    if rules.emphasis == "official":
        return Script((steps,), ((text,),))
    prompt = read_prompt(text, native, composed)
    ends = sorted({end for part in prompt.parts for end in last_steps(part, steps)})
    return Script(
        tuple(ends),
        tuple(tuple(said_in(part.nodes, end, steps) for part in prompt.parts) for end in ends),
        tuple(part.weight for part in prompt.parts),
        prompt.loras,
        prompt.notices,
    )


@dataclass(frozen=True)
class PictureScript:
    """What a picture is told in one language, or None where features are given in place of a text.

    Attributes:
        native: of the native prompt.
        native_negative: of its negative.
        english: of the English prompt.
        english_negative: of its negative.
    """

    native: Script | None
    native_negative: Script | None
    english: Script | None
    english_negative: Script | None

    @property
    def scripts(self) -> tuple[Script, ...]:
        """Those of texts."""
        four = (self.native, self.native_negative, self.english, self.english_negative)
        return tuple(script for script in four if script is not None)

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps behind which any of the texts changes; features never do."""
        return tuple(sorted({end for script in self.scripts for end in script.ends})) or (sys.maxsize,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts: those of both languages side by side, or those of one beside the other's only one.

        Raises:
            UserError: both languages have several parts, and not equally many.
        """
        native = self.native.weights if self.native else (1.0,)
        english = self.english.weights if self.english else (1.0,)
        count = max(len(native), len(english))
        if len(native) not in (1, count) or len(english) not in (1, count):
            raise UserError(
                f"AND joins {len(native)} native prompts and {len(english)} English ones; give as many of"
                " both, or one of a language"
            )
        return tuple(native[i % len(native)] * english[i % len(english)] for i in range(count))

    @property
    def strengths(self) -> dict[str, tuple[float, float]]:
        """(UNet, text encoder) strengths of the adapters that the texts name.

        Raises:
            UserError: one is named with different strengths.
        """
        found: dict[str, tuple[float, float]] = {}
        for lora in (lora for script in self.scripts for lora in script.loras):
            strengths = (lora.unet_strength, lora.text_strength)
            if found.setdefault(lora.name, strengths) != strengths:
                raise UserError(
                    f"the prompts name the adapter {quoted(lora.name)} twice, with strengths {strengths} and"
                    f" {found[lora.name]} (UNet, text encoder); give one"
                )
        return found

    @property
    def structure(self) -> tuple[object, ...]:
        """What pictures that are drawn together have in common."""
        return (self.ends, self.weights, tuple(sorted(self.strengths.items())))

    def texts(self, native: bool) -> list[str]:
        """All that is said in one language."""
        two = (self.native, self.native_negative) if native else (self.english, self.english_negative)
        return list(dict.fromkeys(text for s in two if s for stage in s.said for text in stage))

    def chunks(self, native: bool, count: Callable[[str], int]) -> int:
        """Of the longest text of a language; 0 where there are only features."""
        return max(map(count, self.texts(native)), default=0)


@dataclass(frozen=True)
class StagedPairs:
    """What pictures of one structure are told in one language.

    Attributes:
        positive: by stage and part.
        negative: by stage.
    """

    positive: tuple[tuple[TextsOrFeatures, ...], ...]
    negative: tuple[TextsOrFeatures, ...]

    @classmethod
    def of(cls, given: TextPairs, scripts: Sequence[PictureScript], native: bool) -> StagedPairs:
        """The texts of some pictures.

        Args:
            given: theirs as they are written, or features.
            scripts: theirs, of one structure.
            native: which language.
        """
        first = scripts[0]
        positive, negative = [], []
        for end in first.ends:
            rows = [_said(script, native, end) for script in scripts]
            each = [[row[0][k % len(row[0])] for row in rows] for k in range(len(first.weights))]
            positive.append(
                (given.positive,) * len(each) if isinstance(given.positive, Tensor) else tuple(each)
            )
            other = [row[1] for row in rows]
            negative.append(given.negative if isinstance(given.negative, Tensor) else other)
        return cls(tuple(positive), tuple(negative))

    @property
    def pairs(self) -> list[TextPairs]:
        """Of each stage and part, those of a stage side by side."""
        return [
            TextPairs(positive, negative)
            for parts, negative in zip(self.positive, self.negative, strict=True)
            for positive in parts
        ]

    @property
    def one(self) -> TextPairs | None:
        """What is said in all stages and parts, where that is one thing."""
        first, *others = self.pairs
        same = all(_same(first.positive, o.positive) and _same(first.negative, o.negative) for o in others)
        return first if same else None


@dataclass(frozen=True)
class StagedFeatures:
    """Encoded ``StagedPairs``.

    Attributes:
        positive: by stage and part, each (P, L, D).
        negative: by stage, likewise; None where the drawing needs none.
    """

    positive: tuple[tuple[Tensor, ...], ...]
    negative: tuple[Tensor | None, ...]


def encode_stages(
    staged: StagedPairs, encode: Callable[[TextPairs], tuple[Tensor, Tensor | None]]
) -> StagedFeatures:
    """Encode what is said in all stages, all padded alike.

    Args:
        staged: the texts.
        encode: makes features of pairs (see ``bdm.text.pairs.encode_pairs``).
    """
    stages, parts = len(staged.negative), len(staged.positive[0])
    if (one := staged.one) is not None:
        positive, negative = encode(one)
        return StagedFeatures(((positive,) * parts,) * stages, (negative,) * stages)
    pairs = staged.pairs
    positive, negative = encode(
        TextPairs(_all([p.positive for p in pairs]), _all([p.negative for p in pairs]))
    )
    features = positive.chunk(len(pairs))
    others = [None] * len(pairs) if negative is None else negative.chunk(len(pairs))
    return StagedFeatures(
        tuple(tuple(features[i * parts : (i + 1) * parts]) for i in range(stages)),
        tuple(others[i * parts] for i in range(stages)),
    )


def _said(script: PictureScript, native: bool, step: int) -> tuple[tuple[str, ...], str]:
    positive = script.native if native else script.english
    negative = script.native_negative if native else script.english_negative
    return (
        positive.in_step(step) if positive else ("",),
        negative.in_step(step)[0] if negative else "",
    )


def _same(a: TextsOrFeatures, b: TextsOrFeatures) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def _all(sides: Sequence[TextsOrFeatures]) -> TextsOrFeatures:
    if isinstance(sides[0], Tensor):
        return sides[0].repeat(len(sides), 1, 1)
    return [text for side in sides if not isinstance(side, Tensor) for text in side]
