"""Calls of one network from several drawings, each at a step of its own, in one batch.

Samples of a batch do not see each other, so a drawing's part of a joined batch is what it is alone, but for
how sums are rounded. What a guided step would do twice is done once here too (see ``bdm.speed.sharing``):
the rows of one drawing's call have the same latents, and often the same English text.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from ..method.residuals import scaled
from .joined_texts import JoinedTexts, has_one_picture, side_by_side
from .recognise import KNOWN_ARGUMENTS, all_known, computes_plainly, hooks_are_ours
from .rows import DistinctRows, Rows
from .sharing import encoder_of, prefix_of

#: Arguments of a ControlNet whose meaning for each sample is known.
_OF_CONTROLNETS = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "controlnet_cond",
    "conditioning_scale",
    "return_dict",
}


class JoinedNetwork(Protocol):
    """A network whose calls can be joined."""

    def hang(self, stack: ExitStack) -> None:
        """Hang its savings until ``stack`` closes."""
        ...

    def key(self, values: Mapping[str, Any]) -> Hashable | None:
        """Of calls that can be joined; None for one that cannot be with any.

        Args:
            values: the call's arguments by name.
        """
        ...

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The results of calls of one key, in their order."""
        ...


class JoinedUNet:
    """The backbone's calls.

    Args:
        unet: the backbone.
    """

    def __init__(self, unet: Any) -> None:
        self._unet, self._texts = unet, JoinedTexts()
        self._rows, self._known = DistinctRows(), False

    @property
    def distinct(self) -> DistinctRows:
        """On which rows the encoder runs."""
        return self._rows

    def hang(self, stack: ExitStack) -> None:
        """Let the encoder run on distinct rows, if it is known."""
        self._known = hooks_are_ours(self._unet) and all_known(encoder_of(self._unet))
        self._rows.hang(stack, encoder_of(self._unet))

    def key(self, values: Mapping[str, Any]) -> Hashable | None:
        """Size, kind of numbers and length of the text."""
        other = any(value is not None and name not in KNOWN_ARGUMENTS for name, value in values.items())
        down, middle = _residuals_of(values)
        if other or values.get("return_dict") is not False or (down is None) != (middle is None):
            return None
        return _key(values)

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor]]:
        """See ``JoinedNetwork``."""
        sample, timestep, text, counts = _joined(calls, self._texts)
        rows, chosen = None, None
        if self._known and computes_plainly(sample, self._unet):
            rows, chosen = self._texts.rows(calls)
        self._rows.set(rows, None if chosen is None else (text, chosen))
        down, middle = _joined_residuals(calls, counts)
        try:
            (output,) = self._unet(
                sample, timestep, text, down_block_additional_residuals=down,
                mid_block_additional_residual=middle, return_dict=False,
            )  # fmt: skip
        finally:
            self._rows.set(None)
        return [(part,) for part in output.split(counts)]


class JoinedBranch:
    """The branch's calls.

    Args:
        branch: the branch.
    """

    def __init__(self, branch: Any) -> None:
        self._branch, self._texts = branch, JoinedTexts()
        self._rows, self._known = DistinctRows(), False

    def hang(self, stack: ExitStack) -> None:
        """Let what lies before the first cross-attention run on distinct rows, if it is known."""
        self._known = all_known(prefix_of(self._branch))
        self._rows.hang(stack, prefix_of(self._branch))

    def key(self, values: Mapping[str, Any]) -> Hashable | None:
        """Size, kind of numbers and length of the text."""
        return None if values.get("return_dict") is not False else _key(values)

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """See ``JoinedNetwork``."""
        sample, timestep, text, counts = _joined(calls, self._texts)
        if self._known and computes_plainly(sample, self._branch):
            self._rows.set(_one_each(calls))
        scale = _scale_of(calls, counts)
        try:
            down, middle = self._branch(sample, timestep, text, scale, return_dict=False)
        finally:
            self._rows.set(None)
        parts = zip(*(one.split(counts) for one in down), strict=True)
        return list(zip(parts, middle.split(counts), strict=True))


class JoinedControlNet:
    """A ControlNet's calls, each with its own pictures and strength.

    Args:
        controlnet: the ControlNet.
    """

    def __init__(self, controlnet: Any) -> None:
        self._controlnet, self._texts, self._known = controlnet, JoinedTexts(), False

    def hang(self, stack: ExitStack) -> None:
        """Nothing is hung; where it is known, equal rows of a call are computed once."""
        self._known = all_known([self._controlnet])

    def key(self, values: Mapping[str, Any]) -> Hashable | None:
        """Size, kind of numbers and length of the text, and the same of the pictures."""
        other = any(value is not None and name not in _OF_CONTROLNETS for name, value in values.items())
        picture, one = values["controlnet_cond"], _key(values)
        fits = len(picture) == len(values["sample"]) and values.get("return_dict") is False
        return None if other or one is None or not fits else (one, picture.shape[1:], picture.dtype)

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """See ``JoinedNetwork``."""
        sample, timestep, text, counts = _joined(calls, self._texts)
        pictures = torch.cat([call["controlnet_cond"] for call in calls])
        rows, chosen = None, None
        if self._known and computes_plainly(sample, self._controlnet) and all(map(_has_one_control, calls)):
            rows, chosen = self._texts.rows(calls)
        if rows is not None:
            sample, timestep, pictures = map(rows.select, (sample, timestep, pictures))
        down, middle = self._controlnet(
            sample, timestep, text if chosen is None else chosen, pictures, return_dict=False
        )
        scale, residuals = _scale_of(calls, counts), (*down, middle)
        if rows is not None:
            residuals = map(rows.spread, residuals)
        each = zip(*(scaled(one, scale).split(counts) for one in residuals), strict=True)
        return [(tuple(down), middle) for *down, middle in each]


def _has_one_control(call: Mapping[str, Any]) -> bool:
    """Whether all rows of a call have the same control picture: it is one, which is repeated."""
    picture = call["controlnet_cond"]
    return len(picture) == 1 or picture.stride(0) == 0


def _scale_of(calls: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> float | Tensor:
    """The factor of residuals: one for all, or one for each sample where the calls' differ."""
    scales = [call["conditioning_scale"] for call in calls]
    if all(other == scales[0] for other in scales):
        return scales[0]
    each = [scale for scale, count in zip(scales, counts, strict=True) for _ in range(count)]
    return torch.tensor(each, dtype=torch.float32, device=calls[0]["sample"].device)


def _one_each(calls: Sequence[Mapping[str, Any]]) -> Rows | None:
    """The first row of each call for all of its rows."""
    if not all(map(has_one_picture, calls)):
        return None
    return side_by_side([[0] * len(call["sample"]) for call in calls], calls[0]["sample"].device)


def _key(values: Mapping[str, Any]) -> Hashable | None:
    sample, text, timestep = values["sample"], values["encoder_hidden_states"], values["timestep"]
    one_step = not isinstance(timestep, Tensor) or timestep.numel() == 1
    if sample.ndim != 4 or text.ndim != 3 or len(text) != len(sample) or not one_step:
        return None
    return sample.shape[1:], sample.dtype, sample.device, text.shape[1:], text.dtype


def _joined(
    calls: Sequence[Mapping[str, Any]], texts: JoinedTexts
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Samples, a timestep for each, their texts, and how many each call has."""
    samples = [call["sample"] for call in calls]
    counts, device = [len(sample) for sample in samples], samples[0].device
    # Networks read timesteps in single precision, whole ones too.
    steps = [
        torch.as_tensor(call["timestep"]).to(device, torch.float32).reshape(1).expand(count)
        for call, count in zip(calls, counts, strict=True)
    ]
    return torch.cat(samples), torch.cat(steps), texts.of(calls), counts


def _residuals_of(values: Mapping[str, Any]) -> tuple[Any, Any]:
    return values.get("down_block_additional_residuals"), values.get("mid_block_additional_residual")


def _joined_residuals(calls: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> tuple[Any, Any]:
    """Residuals of all calls; zeros for those that have none, None where none has any."""
    each = [_residuals_of(call) for call in calls]
    some = next((one for one in each if one[1] is not None), None)
    if some is None:
        return None, None
    pieces = [
        (*down, middle) if middle is not None else [_zeros(like, count) for like in (*some[0], some[1])]
        for (down, middle), count in zip(each, counts, strict=True)
    ]
    *down, middle = [joined_rows(_of_one_size(same)) for same in zip(*pieces, strict=True)]
    return tuple(down), middle


def _of_one_size(pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """Residuals that are added to the same features; those that are pooled over the picture are repeated."""
    sizes = {piece.shape[1:] for piece in pieces}
    if len(sizes) == 1:
        return pieces
    size = torch.broadcast_shapes(*sizes)
    return [piece.expand(len(piece), *size) for piece in pieces]


def _zeros(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(count, *like.shape[1:])


def joined_rows(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other; nothing is copied where they lie so in memory already."""
    first = pieces[0]
    place, strides = first.storage_offset(), first.stride()
    memory = first.untyped_storage().data_ptr()
    for piece in pieces:
        beside = piece.untyped_storage().data_ptr() == memory and piece.storage_offset() == place
        if not beside or piece.stride() != strides or piece.dtype != first.dtype:
            return torch.cat(list(pieces))
        place += len(piece) * strides[0]
    return first.as_strided((sum(map(len, pieces)), *first.shape[1:]), strides, first.storage_offset())
