"""Which parts of a UNet's batch are negative and which are positive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diffusers.models import attention_processor
from torch import Tensor

from ..errors import UserError
from .condition import GUIDED, NativeCondition, Part

#: Processors of perturbed-attention guidance (arXiv 2403.17377) and the parts that their pipelines stack.
_PERTURBED: dict[type, tuple[Part, ...]] = {
    attention_processor.PAGIdentitySelfAttnProcessor2_0: ("positive", "positive"),
    attention_processor.PAGCFGIdentitySelfAttnProcessor2_0: ("negative", "positive", "positive"),
}


@dataclass(frozen=True)
class _Reading:
    """A batch whose parts have been told.

    Attributes:
        text: its text features, held so that no other tensor comes to lie in their memory.
        version: theirs, which counts changes in place; None where nothing counts them.
        parts: what was told.
    """

    text: Tensor
    version: int | None
    parts: tuple[Part, ...]


class PartReader:
    """Tells the parts of a batch by the pipeline's word, by its attention processors, or by its texts.

    A plain pair is [negative, positive], as all of diffusers' pipelines stack it. Larger batches are read off
    their texts. The first is the negative prompt's; a part behind one with that text is positive; a part with
    another text still is an English concept (semantic guidance, safe guidance), which is told the negative
    prompt, so that the difference between the two is the concept's alone. A part taken out of a batch that
    was told before keeps what it was (self-attention guidance).

    Args:
        condition: the condition of the call.
    """

    def __init__(self, condition: NativeCondition) -> None:
        self._condition = condition
        self._reading: _Reading | None = None

    def parts(self, batch: int, text: Any, unet: Any) -> tuple[Part, ...]:
        """The parts of a batch.

        Args:
            batch: samples that the UNet is given.
            text: (B, M, E) the UNet's text features.
            unet: whose attention processors tell of perturbed attention.

        Raises:
            UserError: the batch is not made of whole parts, has not as many as the pipeline says, or its
                texts do not tell them apart.
        """
        count = self._condition.count_parts(batch)
        if self._condition.parts is not None:
            return self._as_told(count)
        if not isinstance(text, Tensor) or len(text) % count:
            text = None
        if count == 1:
            return (self._taken_from(text),)
        if text is None:
            return self._pair(count)
        reading, version = self._reading, version_of(text)
        known = reading is not None and reading.text is text and reading.version == version is not None
        if reading is None or not known or len(reading.parts) != count:
            reading = self._reading = _Reading(text, version, self._tell(count, text, unet))
        return reading.parts

    def _as_told(self, count: int) -> tuple[Part, ...]:
        assert self._condition.parts is not None
        told = tuple(self._condition.parts())
        if len(told) != count:
            raise UserError(
                f"the UNet got {count} parts of {self._condition.samples} samples and the condition names"
                f" {len(told)}: {', '.join(map(str, told))}; name as many as the pipeline stacks"
            )
        return told

    def _pair(self, count: int) -> tuple[Part, ...]:
        if count != 2:
            raise self._untold(count)
        return GUIDED

    def _tell(self, count: int, text: Tensor, unet: Any) -> tuple[Part, ...]:
        perturbed = _perturbed_parts(unet)
        if len(perturbed) == count:
            return perturbed
        if count == 2:
            return GUIDED
        parts = _read_off(text.unflatten(0, (count, -1)))
        if "positive" not in parts:
            raise self._untold(count)
        return parts

    def _taken_from(self, text: Tensor | None) -> Part:
        """A single part: positive, but where its features are the negative part of a batch told before."""
        if text is None or self._reading is None:
            return "positive"
        whole, parts = self._reading.text, self._reading.parts
        if text.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return "positive"
        rows = len(whole) // len(parts)
        distance, size = int(text.storage_offset() - whole.storage_offset()), whole.stride(0) * rows
        place, rest = divmod(distance, max(1, size))
        return parts[place] if not rest and 0 <= place < len(parts) else "positive"

    def _untold(self, count: int) -> UserError:
        return UserError(
            f"the UNet got {count} parts of {self._condition.samples} samples with the same English text, and"
            ' nothing tells which are negative; give the condition parts=lambda: ("negative", "positive", ..)'
        )


def _perturbed_parts(unet: Any) -> tuple[Part, ...]:
    """The parts that perturbed-attention guidance stacks; none where the UNet has no such processors."""
    found = {_PERTURBED.get(type(processor)) for processor in _processors(unet)} - {None}
    return found.pop() or () if len(found) == 1 else ()


def _processors(unet: Any) -> Iterable[Any]:
    return (module.processor for module in unet.modules() if hasattr(module, "processor"))


def _read_off(texts: Tensor) -> tuple[Part, ...]:
    """Parts by their text features (count, rows, M, E)."""
    equal = (texts[:, None] == texts[None]).flatten(2).all(2)
    is_negative, same = equal[0].tolist(), equal.tolist()
    parts: list[Part] = []
    for i, negative in enumerate(is_negative):
        behind_negative = i > 0 and is_negative[i - 1]
        as_positive = any(parts[j] == "positive" and same[i][j] for j in range(i))
        parts.append("positive" if not negative and (behind_negative or as_positive) else "negative")
    return tuple(parts)


def version_of(tensor: Tensor) -> int | None:
    """A count of changes in place; None for inference tensors, of which nothing counts them."""
    return None if tensor.is_inference() else tensor._version
