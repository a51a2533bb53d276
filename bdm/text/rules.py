"""How prompts are read: as A1111 reads them, or as the official inference script does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

from ..errors import UserError, quoted
from ..extras import import_extra

Mode = Literal["a1111", "official"]
Punctuation = Literal["kept", "full", "half"]

_HALF, _FULL = ",.:;!?()", "，。：；！？（）"
_PUNCTUATION: dict[str, dict[int, int]] = {
    "kept": {},
    "full": str.maketrans(_HALF, _FULL),
    "half": str.maketrans(_FULL + "、", _HALF + ","),
}


@dataclass(frozen=True)
class PromptRules:
    """How the prompts of a drawing are read; what is written into its pictures.

    Attributes:
        emphasis: "a1111" (the default): its whole grammar in both languages. "official": brackets weigh words
            in the English prompt and are taken away from the native one, and nothing else is syntax.
        chunks: "a1111" (the default): BREAK and commas end chunks, of which there may be any number, and each
            keeps its markers: n chunks of CLIP are 77 n positions. "official": chunks are cut where they are
            full, five at most, and inner markers are dropped: 75 n + 2.
        routing: quality tags and trigger words in the native prompt act on the English side (see
            ``bdm.text.routing``). Only with emphasis "a1111".
        simplified: the native prompt's traditional characters are read as simplified ones; needs opencc.
        punctuation: the native prompt's marks are "kept", or read as "full" width (，。) or "half" (, .).

    Raises:
        UserError: another value.
    """

    emphasis: Mode = "a1111"
    chunks: Mode = "a1111"
    routing: bool = True
    simplified: bool = False
    punctuation: Punctuation = "kept"

    def __post_init__(self) -> None:
        for names, values in (
            (("emphasis", "chunks"), get_args(Mode)),
            (("routing", "simplified"), (True, False)),
            (("punctuation",), get_args(Punctuation)),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, bool | str) or value not in values:
                    allowed = ", ".join(map(str, values))
                    raise UserError(f"prompt rules: {name} is {quoted(value)}; allowed are {allowed}")

    @property
    def weighs_native(self) -> bool:
        """Whether the native prompt's grammar has an effect."""
        return self.emphasis == "a1111"

    def facts(self) -> dict[str, Any]:
        """What a picture says of them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def native_letters(self) -> Callable[[str], str]:
        """What is done to the words of native prompts before they are tokenised.

        Raises:
            UserError: opencc is asked for and not installed.
        """
        marks = _PUNCTUATION[self.punctuation]
        simplify = _simplifier() if self.simplified else str
        return lambda text: simplify(text).translate(marks)


#: As A1111 reads prompts; the default of drawing.
A1111 = PromptRules()
#: As the official inference reads them; what branches are trained with.
OFFICIAL = PromptRules(emphasis="official", chunks="official", routing=False)


@cache
def _simplifier() -> Callable[[str], str]:
    return import_extra("traditional characters read as simplified ones").OpenCC("t2s").convert
