"""Pipelines without a branch: the UNet itself reads what the native text encoder says.

The native features take the place of English CLIP's. An English prompt, where there is an encoder for it, is
put behind them, so that the UNet attends to the tokens of both (as ELLA does with trigger words).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, quoted
from ..text.native import NativeTextEncoder
from ..text.pairs import TextPairs
from ..text.script import StagedFeatures


def check_text_slot(unet: Any, native_text_encoder: NativeTextEncoder | None) -> None:
    """Refuse a native text encoder whose features a UNet does not read; parts that are None fit everything.

    Raises:
        UserError: names both widths.
    """
    if unet is not None and native_text_encoder is not None:
        check_width(unet, native_text_encoder.text_dim, "the native text encoder's features")


def check_width(unet: Any, width: int, what: str) -> None:
    """Refuse native features that a UNet does not read.

    Args:
        unet: the UNet.
        width: of the features.
        what: they are.

    Raises:
        UserError: names both widths.
    """
    wanted = unet.config["cross_attention_dim"]
    if width != wanted:
        raise UserError(
            f"{what} are {width} wide and the UNet reads {wanted}; without a branch they must be equal: give"
            " the text encoder that the UNet was trained with, or a branch"
        )


def says_something(english: Sequence[TextPairs]) -> bool:
    """Whether English prompts or their negatives say anything; features that are given do."""
    sides = [side for pairs in english for side in (pairs.positive, pairs.negative)]
    return any(isinstance(side, Tensor) or any(side) for side in sides)


def joined_stages(native: StagedFeatures, english: StagedFeatures) -> StagedFeatures:
    """Native features of all stages and parts with English ones behind them (see ``joined``)."""
    positive = [
        tuple(joined(ours, theirs) for ours, theirs in zip(*parts, strict=True))
        for parts in zip(native.positive, english.positive, strict=True)
    ]
    # Unguided, nobody asks what negatives say.
    pairs = zip(native.negative, english.negative, strict=True)
    negative = [None if ours is None or theirs is None else joined(ours, theirs) for ours, theirs in pairs]
    return StagedFeatures(tuple(positive), tuple(negative))


def joined(native: Tensor, english: Tensor) -> Tensor:
    """Native features with English ones behind them, token by token.

    Args:
        native: (P, L, D).
        english: (P, M, D).

    Returns:
        (P, L + M, D).

    Raises:
        UserError: features of two widths.
    """
    if native.shape[-1] != english.shape[-1]:
        raise UserError(
            f"the native features are {native.shape[-1]} wide and the English ones {english.shape[-1]}; the"
            " UNet reads both only where they are equal: leave prompt_en out"
        )
    return torch.cat([native, english.to(native)], dim=1)


def refuse_branch_settings(**given: tuple[Any, Any]) -> None:
    """Refuse what only means something for a branch.

    Args:
        given: by name, a value with what it is where nobody asks for anything.

    Raises:
        UserError: names the first.
    """
    for name, (value, usual) in given.items():
        if value != usual:
            raise UserError(
                f"{name} is {quoted(value)}, and the pipeline has no branch that it acts on; leave it out"
            )
