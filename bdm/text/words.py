"""Which tokens of a prompt's features are which words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .english import encode_english
from .native import NativeTextEncoder
from .rules import A1111, PromptRules

_PUNCTUATION = r"[\s,.;:!?，。、；：！？（）()\[\]【】|]+"


@dataclass(frozen=True)
class ReadTokens:
    """What a text encoder has read of one prompt.

    Attributes:
        prompt: the text.
        ids: (chunks, length) tokens, markers and padding among them.
        tokenizer: that they are of.
        dropped: markers that are left out between two chunks.
        normalize: what is done to a text before it is read.
    """

    prompt: str
    ids: Tensor
    tokenizer: Any
    dropped: int
    normalize: Callable[[str], str] = str

    @cached_property
    def _letters(self) -> list[tuple[str, int]]:
        """Every letter of the text as the tokenizer has it, with the place of its token among all ids."""
        special = set(self.tokenizer.all_special_ids)
        return [
            (letter, place)
            for place, token in enumerate(self.ids.flatten().tolist())
            if token not in special
            for letter in _piece(self.tokenizer.convert_ids_to_tokens(token))
        ]

    def words(self) -> list[str]:
        """The parts of the prompt between punctuation; of an English one its words."""
        parts = re.split(_PUNCTUATION, re.sub(r"<[^>]*>|:[-+.\d]+", " ", self.prompt))
        text = "".join(letter for letter, _ in self._letters)
        return list(dict.fromkeys(part for part in parts if part and self._normal(part) in text))

    def positions(self, word: str) -> list[int]:
        """Where a word's tokens lie in the prompt's features, wherever it stands.

        Args:
            word: a part of the prompt.

        Raises:
            UserError: it is not in the prompt, as the text encoder has read it.
        """
        text, normal = "".join(letter for letter, _ in self._letters), self._normal(word)
        starts = [found.start() for found in re.finditer(re.escape(normal), text)] if normal else []
        if not starts:
            raise UserError(
                f"the word {word!r} is not in the prompt {self.prompt[:60]!r} as the text encoder has read"
                " it; give words that stand in it"
            )
        places = {self._letters[start + i][1] for start in starts for i in range(len(normal))}
        return [place - place // self.ids.shape[1] * self.dropped for place in sorted(places)]

    def _normal(self, word: str) -> str:
        """A word's letters as the tokenizer has them."""
        ids = self.tokenizer(self.normalize(word), add_special_tokens=False, verbose=False).input_ids
        return "".join(_piece(token) for token in self.tokenizer.convert_ids_to_tokens(ids))


def _dropped(tokenizer: Any, rules: PromptRules) -> int:
    return 0 if rules.chunks == "a1111" else len(tokenizer("").input_ids)


def _piece(token: str) -> str:
    """A token's letters, without what says how it is joined to others."""
    return token.removeprefix("##").replace("▁", "").removesuffix("</w>")


def read_native(prompt: str, encoder: NativeTextEncoder | None, rules: PromptRules = A1111) -> ReadTokens:
    """What a native text encoder reads of a prompt.

    Args:
        prompt: the text.
        encoder: the encoder.
        rules: by which the prompt is read.

    Raises:
        UserError: there is none.
    """
    if encoder is None:
        raise UserError("the pipeline has no native text encoder, so nothing tells words from tokens")
    with _seeing(encoder.model) as seen:
        encoder.encode([prompt], rules)
    lower, change = str.lower if encoder.settings.lower_case else str, rules.native_letters()
    dropped = _dropped(encoder.tokenizer, rules)
    return ReadTokens(prompt, seen(), encoder.tokenizer, dropped, lambda text: lower(change(text)))


def read_english(prompt: str, text_encoder: Any, tokenizer: Any, rules: PromptRules = A1111) -> ReadTokens:
    """What the English text encoder reads of a prompt (see ``read_native``).

    Raises:
        UserError: there is none.
    """
    if text_encoder is None or tokenizer is None:
        raise UserError("the pipeline has no English text encoder; load it with english=True")
    with _seeing(text_encoder) as seen:
        encode_english([prompt], text_encoder, tokenizer, rules=rules)
    return ReadTokens(prompt, seen(), tokenizer, _dropped(tokenizer, rules))


@contextmanager
def _seeing(model: Any) -> Iterator[Callable[[], Tensor]]:
    """The tokens that a text encoder is given inside the block."""
    found: list[Tensor] = []

    def see(_: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["input_ids"]).cpu())

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad():
            yield lambda: torch.cat(found)
    finally:
        handle.remove()
