"""Work that a guided step of a bilingual model would do twice, done once; the picture stays the same.

A guided pipeline stacks its batch as [negative, positive] over the same latents. Where both halves of a row also have
the same English condition (always with "" and ""), the backbone's input, encoder and middle block see equal rows: they
run on the distinct ones, and their results are repeated for the decoder, where the branch makes the halves differ. Of
the branch, whose halves do differ in text, the part before the first cross-attention is shared in the same way. Keys
and values of cross-attentions depend on the text alone and are kept from step to step.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..method.condition import GUIDED
from ..method.parts import version_of
from ..method.step import UNetCall
from .recognise import all_known, call_is_known, computes_plainly, hooks_are_ours, is_known
from .rows import DistinctRows, Rows
from .stand_in import stand_in


class SharedRows:
    """Runs encoder, middle block and the branch's beginning once for equal halves of a guided step.

    Args:
        same_latents: the pipeline stacks the same latents twice, by construction. Else halves are compared
            where that costs nothing, on the CPU.
        undisturbed: nobody's code runs between the steps, so that what was known of the networks in the first
            holds in all. Else it is looked at in each.
    """

    def __init__(self, same_latents: bool = False, undisturbed: bool = False) -> None:
        self._same_latents, self._undisturbed = same_latents, undisturbed
        self._encoder, self._prefix = DistinctRows(), DistinctRows()
        self._networks: tuple[Any, Any] | None = None
        self._known: bool | None = None
        self._text: tuple[Tensor, int | None, Rows | None, Tensor | None] | None = None

    def hang(self, stack: ExitStack, unet: Any, branch: Any) -> None:
        """Hook the backbone's encoder and the branch's text-free beginning."""
        self._networks, self._known, self._text = (unet, branch), None, None
        stack.callback(setattr, self, "_networks", None)
        self._encoder.hang(stack, _encoder_of(unet))
        self._prefix.hang(stack, _prefix_of(branch))

    def before(self, call: UNetCall) -> None:
        """Choose the rows of a call: all of them, unless it is known completely and halves are equal."""
        self._encoder.set(None)
        self._prefix.set(None)
        if call.parts != GUIDED or not self._halves_are_equal(call.sample) or not self._knows(call):
            return
        self._prefix.set(Rows.half(len(call.sample), second=False, device=call.sample.device))
        rows, chosen = self._rows_of(call.text)
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
        if self._known is None or not self._undisturbed:
            self._known = hooks_are_ours(unet) and all_known((*_encoder_of(unet), *_prefix_of(branch)))
        return self._known

    def _halves_are_equal(self, latents: Tensor) -> bool:
        if self._same_latents:
            return True
        if latents.device.type != "cpu":
            return False
        half = len(latents) // 2
        return torch.equal(latents[:half], latents[half:])

    def _rows_of(self, text: Tensor) -> tuple[Rows | None, Tensor | None]:
        """The distinct rows of text features and their selection; compared once for each tensor."""
        version = version_of(text)
        kept = self._text
        if kept is None or kept[0] is not text or version is None or kept[1] != version:
            rows = _distinct(text)
            kept = self._text = (text, version, rows, None if rows is None else rows.select(text))
        return kept[2], kept[3]


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
    return [layer for layer in (attention.to_k, attention.to_v) if type(layer) is nn.Linear and is_known(layer)]


def _encoder_of(unet: Any) -> list[nn.Module]:
    return [unet.conv_in, *unet.down_blocks, unet.mid_block]


def _prefix_of(branch: Any) -> list[nn.Module]:
    return [branch.conv_in, branch.down_blocks[0].resnets[0]]


def _distinct(text: Tensor) -> Rows | None:
    """Rows of guided features (2N, L, D) whose halves differ, each once; None where all do."""
    half = len(text) // 2
    own = [i for i, same in enumerate((text[:half] == text[half:]).flatten(1).all(1).tolist()) if not same]
    if len(own) == half:
        return None
    place = {i: half + n for n, i in enumerate(own)}
    chosen = [*range(half), *(half + i for i in own)]
    return Rows.of(chosen, [*range(half), *(place.get(i, i) for i in range(half))], text.device)
