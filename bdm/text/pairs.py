"""Positive and negative texts of one language, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError

#: Texts, or their (P, L, D) features.
TextsOrFeatures = list[str] | Tensor


@dataclass(frozen=True)
class TextPairs:
    """What P prompts say in one language, each beside its negative.

    Attributes:
        positive: P texts, or (P, L, D) features.
        negative: the same of the negative prompts.
    """

    positive: TextsOrFeatures
    negative: TextsOrFeatures

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def only_positive(self) -> Tensor | None:
        """The positive features where nothing but them is given: no other features, and no negative text."""
        given = isinstance(self.positive, Tensor) and not isinstance(self.negative, Tensor)
        return self.positive if given and not any(self.negative) else None  # pyright: ignore

    def take(self, indices: Sequence[int]) -> TextPairs:
        """The pairs of some prompts."""
        return TextPairs(_take(self.positive, indices), _take(self.negative, indices))

    def chunks(self, count: Callable[[str], int]) -> list[int]:
        """Chunks of each pair's longer text, to which the other is padded; 0 where features are given."""
        sides = [side for side in (self.positive, self.negative) if not isinstance(side, Tensor)]
        return [max([count(side[i]) for side in sides], default=0) for i in range(len(self))]


def _take(side: TextsOrFeatures, indices: Sequence[int]) -> TextsOrFeatures:
    return side[list(indices)] if isinstance(side, Tensor) else [side[i] for i in indices]


def groups_of_one_length(*lengths: Sequence[Hashable]) -> list[list[int]]:
    """Prompts by their lengths in all languages, and whatever else they must have in common.

    A prompt is padded by empty chunks to the longest that it is drawn beside, and padding is attended: drawn
    beside a longer one it would be another picture.

    Args:
        lengths: of each language, P chunk counts; or P other values of one kind.

    Returns:
        Indices of the prompts that can be drawn together, in the order in which the groups begin.
    """
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for i, length in enumerate(zip(*lengths, strict=True)):
        groups.setdefault(length, []).append(i)
    return list(groups.values())


def sequence_of(texts: Any, name: str) -> list[Any]:
    """What stands for several texts, as a list.

    Raises:
        UserError: it does not.
    """
    if not isinstance(texts, Iterable):
        raise UserError(f"{name} is {texts!r}, which is no text; give a text, or one for each prompt")
    return list(texts)


def one_each(texts: str | Sequence[str] | None, count: int, name: str) -> list[str]:
    """One text for all prompts, or one for each.

    Raises:
        UserError: another number of texts, or something that is no text.
    """
    each = [texts or ""] * count if texts is None or isinstance(texts, str) else sequence_of(texts, name)
    if len(each) != count:
        raise UserError(f"{name} has {len(each)} texts for {count} prompts; give one, or one for each")
    for text in each:
        if not isinstance(text, str):
            raise UserError(f"{name} holds {text!r}, which is no text; give a text, or one for each prompt")
    return each


def same_shape(given: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Features for each prompt, from one or as many.

    Raises:
        UserError: their shape is another than that of the features beside them.
    """
    given = given.expand(wanted.shape[0], -1, -1) if len(given) == 1 else given
    if given.shape != wanted.shape:
        raise UserError(
            f"{name} has shape {tuple(given.shape)}, the features beside it have {tuple(wanted.shape)}; they"
            " must be equal"
        )
    return given


def make_pairs(
    embeds: Tensor | None,
    prompt: str | Sequence[str] | None,
    negative_embeds: Tensor | None,
    negative: str | Sequence[str] | None,
    count: int,
    name: str,
    negative_name: str,
) -> TextPairs:
    """The pairs of a call's arguments in one language; features take the place of texts.

    Args:
        embeds: (P, L, D) or None.
        prompt: one text for all prompts, or P.
        negative_embeds: (P or 1, L, D) or None.
        negative: one text for all prompts, or P.
        count: P, unless ``embeds`` tell it.
        name: of ``prompt``, for messages.
        negative_name: of ``negative``.

    Raises:
        UserError: numbers or shapes that do not fit.
    """
    for given, of in ((embeds, name), (negative_embeds, negative_name)):
        if given is not None and not isinstance(given, Tensor):
            raise UserError(f"{of}_embeds is a {type(given).__name__}; give a tensor of text features")
    positive = one_each(prompt, count, name) if embeds is None else embeds
    if negative_embeds is None:
        return TextPairs(positive, one_each(negative, len(positive), negative_name))
    if isinstance(positive, Tensor):
        return TextPairs(positive, same_shape(negative_embeds, positive, f"{negative_name}_embeds"))
    return TextPairs(positive, negative_embeds.expand(len(positive), -1, -1))


def encode_pairs(
    pairs: TextPairs, encode: Callable[[list[str]], Tensor], negative_name: str, together: bool = True
) -> tuple[Tensor, Tensor]:
    """(P, L, D) features of both sides.

    Args:
        pairs: the texts.
        encode: gives the features of texts.
        negative_name: for messages.
        together: encode the texts of both sides at once, so that they are padded alike. Where all are of one
            length anyway, stock pipelines encode them apart, and the last bits depend on it.

    Raises:
        UserError: features that were given are not as long as those of the texts beside them.
    """
    positive, negative = pairs.positive, pairs.negative
    if together and not isinstance(positive, Tensor) and not isinstance(negative, Tensor):
        positive, negative = encode([*positive, *negative]).chunk(2)
    if not isinstance(positive, Tensor):
        positive = encode(positive)
    if not isinstance(negative, Tensor):
        negative = encode(negative)
    return positive, same_shape(negative, positive, negative_name)
