"""Texts of calls that are made as one, and which rows of those calls are equal."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import Rows
from .sharing import equal_rows

#: Joined texts that are kept, with what was found of them.
_MOST_TEXTS = 8


class JoinedTexts:
    """Text features of several calls as one: the same tensor as long as the calls bring the same ones.

    What others make of it (keys and values, see ``bdm.speed.sharing.KeptProjections``) stays valid so long.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[list[Tensor], Tensor]] = OrderedDict()
        self._rows: dict[Hashable, tuple[Rows | None, Tensor | None]] = {}

    def of(self, calls: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B, L, D) of all calls."""
        texts, key = _texts_of(calls)
        if key not in self._kept:
            self._kept[key] = (texts, torch.cat(texts))
            while len(self._kept) > _MOST_TEXTS:
                self._rows.pop(self._kept.popitem(last=False)[0], None)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def rows(self, calls: Sequence[Mapping[str, Any]]) -> tuple[Rows | None, Tensor | None]:
        """Which rows of the batch stand for all, latents and text alike, and their text."""
        if not all(map(has_one_picture, calls)):
            return None, None
        texts, key = _texts_of(calls)
        if key not in self._rows:
            rows = side_by_side([equal_rows(text, len(text)) for text in texts], texts[0].device)
            self._rows[key] = (rows, None if rows is None else rows.select(self.of(calls)))
        return self._rows[key]


def _texts_of(calls: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], Hashable]:
    texts = [call["encoder_hidden_states"] for call in calls]
    return texts, tuple((id(text), text._version) for text in texts)


def has_one_picture(call: Mapping[str, Any]) -> bool:
    """Whether all rows of a call have the same latents.

    Drawings of one picture stack theirs, so elsewhere than on the CPU, where looking waits for all work
    before, they are taken at their word.
    """
    sample = call["sample"]
    return sample.device.type != "cpu" or all(torch.equal(sample[0], other) for other in sample[1:])


def side_by_side(stand_for: Sequence[Sequence[int]], device: Any) -> Rows | None:
    """Rows of calls side by side, by which row of its call each one is equal to; None where all differ."""
    starts = [sum(map(len, stand_for[:i])) for i in range(len(stand_for))]
    rows = [start + row for start, each in zip(starts, stand_for, strict=True) for row in each]
    return Rows.standing_for(rows, device)
