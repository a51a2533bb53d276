"""Work that a guided step of a bilingual model would do twice, done once; the picture stays the same.

A guided pipeline stacks its batch as [negative, positive] over the same latents. Where several parts of a row
also have the same English condition (always with "" and ""), the backbone's input, encoder and middle block
see equal rows: they run on the distinct ones, and their results are repeated for the decoder, where the
branch makes the parts differ. Of the branch, whose parts do differ in text, what lies before the first
cross-attention is shared in the same way. Keys and values of cross-attentions depend on the text alone and
are kept from step to step.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.composed import COMPOSED
from ..method.condition import GUIDED
from ..method.step import UNetCall
from .recognise import all_known, call_is_known, computes_plainly, hooks_are_ours, is_known
from .rows import DistinctRows, Rows
from .stand_in import stand_in


@dataclass(frozen=True)
class Vouched:
    """What a pipeline vouches for, by construction.

    Of a pipeline that is not known, nobody vouches for anything.

    Attributes:
        same_latents: both halves of a guided step are given the same latents.
        same_texts: nobody writes into the text features between the steps.
        undisturbed: nobody's code runs between the steps, no callback and no hook, so that what was known or
            kept in one holds in the next.
    """

    same_latents: bool = False
    same_texts: bool = False
    undisturbed: bool = False


#: A pipeline of which nothing is known.
UNKNOWN = Vouched()


class SharedRows:
    """Runs encoder, middle block and the branch's beginning once for equal parts of a guided step.

    What nobody vouches for is looked at in each step where that costs nothing, on the CPU; on other devices
    it would wait for all work before, so the plain way is taken there.

    Args:
        vouched: what the pipeline vouches for.
    """

    def __init__(self, vouched: Vouched = UNKNOWN) -> None:
        self._vouched = vouched
        self._encoder, self._prefix = DistinctRows(), DistinctRows()
        self._networks: tuple[Any, Any] | None = None
        self._known: bool | None = None
        self._first: Rows | None = None
        self._text: tuple[Tensor, Rows | None, Tensor | None] | None = None

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Hook the backbone's encoder and the branch's text-free beginning."""
        self._networks, self._known, self._text = (unet, branch), None, None
        stack.callback(setattr, self, "_networks", None)
        self._encoder.hang(stack, encoder_of(unet))
        self._prefix.hang(stack, prefix_of(branch))

    def before(self, call: UNetCall) -> None:
        """Choose the rows of a call: all of them, unless it is known completely and its parts are equal."""
        self._encoder.set(None)
        self._prefix.set(None)
        count = len(call.parts)
        joined = call.parts[:2] == GUIDED and all(isinstance(part, int) for part in call.parts[2:])
        if not (joined or call.parts == COMPOSED) or not self._latents_are_equal(call.sample, count):
            return
        if not self._knows(call):
            return
        self._prefix.set(self._first_part(call.sample, count))
        rows, chosen = self._rows_of(call.text, count)
        if rows is not None and chosen is not None:
            self._encoder.set(rows, (call.text, chosen))

    def after(self, output: Any) -> Any:
        """All rows are distinct again."""
        self._encoder.set(None)
        self._prefix.set(None)
        return output

    def _knows(self, call: UNetCall) -> bool:
        if self._networks is None or self._networks[0] is not call.unet:
            return False
        unet, branch = self._networks
        if not call_is_known(call) or not computes_plainly(call.sample, unet, branch):
            return False
        if self._known is None or not self._vouched.undisturbed:
            self._known = hooks_are_ours(unet) and all_known((*encoder_of(unet), *prefix_of(branch)))
        return self._known

    def _latents_are_equal(self, latents: Tensor, parts: int) -> bool:
        if self._vouched.same_latents:
            return True
        if latents.device.type != "cpu":
            return False
        first, *others = latents.chunk(parts)
        return all(torch.equal(first, other) for other in others)

    def _first_part(self, latents: Tensor, parts: int) -> Rows:
        kept = self._first
        if kept is None or (kept.batch, len(kept.chosen), kept.chosen.device) != (
            len(latents),
            len(latents) // parts,
            latents.device,
        ):
            kept = self._first = Rows.part(len(latents), 0, parts, latents.device)
        return kept

    def _rows_of(self, text: Tensor, parts: int) -> tuple[Rows | None, Tensor | None]:
        """The distinct rows of text features and their selection; once for a tensor that stays as it is."""
        kept = self._text
        if not self._vouched.same_texts and text.device.type != "cpu":
            return None, None
        if kept is None or kept[0] is not text or not self._vouched.same_texts:
            rows = _distinct(text, parts)
            kept = self._text = (text, rows, None if rows is None else rows.select(text))
        return kept[1], kept[2]


class KeptProjections:
    """Keeps keys and values of the text for all steps that are given the very same text features.

    Only for pipelines between whose steps nobody's code runs: then features and weights cannot change.
    """

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Let the text projections of both networks keep their results."""
        for network in (unet, branch):
            for name, attention in network.named_modules():
                # Another processor might write into what it is given.
                for layer in _text_projections(name, attention) if is_known(attention) else ():
                    stand_in(stack, layer, _KeptProjection())

    def before(self, call: UNetCall) -> None:
        """Nothing: the projections see by themselves what they are given."""

    def after(self, output: Any) -> Any:
        """The output as it is."""
        return output


class _KeptProjection:
    """The last result of a projection, while the same features come."""

    def __init__(self) -> None:
        # As one value, so that two threads do not meet halves of it.
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: Any, plain: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not computes_plainly(args[0]):
            return plain(layer, *args, **kwargs)
        kept = self._kept
        if kept is None or kept[0] is not args[0]:
            kept = self._kept = (args[0], plain(layer, args[0]))
        return kept[1]


def _text_projections(name: str, attention: Any) -> list[nn.Module]:
    if not name.endswith(".attn2"):
        return []
    return [
        layer for layer in (attention.to_k, attention.to_v) if type(layer) is nn.Linear and is_known(layer)
    ]


def encoder_of(unet: Any) -> list[nn.Module]:
    """What of a backbone runs before the branch acts on it."""
    return [unet.conv_in, *unet.down_blocks, unet.mid_block]


def prefix_of(branch: Any) -> list[nn.Module]:
    """What of a branch runs before it reads its text."""
    return [branch.conv_in, branch.down_blocks[0].resnets[0]]


def equal_rows(text: Tensor, parts: int) -> list[int]:
    """For every row of features (parts x N, L, D) the first one of its sample that says the same."""
    each = text.unflatten(0, (parts, -1))
    equal = (each[:, None] == each[None]).flatten(3).all(3)
    first, count = equal.int().argmax(1).flatten().tolist(), each.shape[1]
    return [part * count + i % count for i, part in enumerate(first)]


def _distinct(text: Tensor, parts: int) -> Rows | None:
    """The rows of guided features (parts x N, L, D) that differ from those of the parts before, each once.

    None where all do.
    """
    stands_for = equal_rows(text, parts)
    return Rows.standing_for(stands_for, text.device)
