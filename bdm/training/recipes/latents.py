"""Pictures -> latents, encoded when they are met or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ...data.batch import Batch
from ...data.source import Example, Source, UnreadableExample, example_or_reason, to_unit_range
from ...errors import UserError
from ...models.backbone import encode_moments, sample_latents

#: Pictures that the VAE encodes at once, and those that are read for it.
AT_ONCE, READ = 16, 64


@torch.no_grad()
def draw_latents(vae: Any, batch: Batch) -> Tensor:
    """(B, C, h, w) fresh scaled latents of a batch's pictures."""
    if batch.moments is None:
        assert batch.pixels is not None
        # A validation's pictures at once would take more memory than a training step.
        moments = torch.cat([_encode(vae, part) for part in batch.pixels.split(AT_ONCE)])
    else:
        moments = batch.moments.to(vae.device, torch.float32)
    noise = batch.randn(moments.shape[1] // 2, *moments.shape[2:]).to(moments)
    return sample_latents(vae, moments, noise)


def _encode(vae: Any, pixels: Tensor) -> Tensor:
    return encode_moments(vae, to_unit_range(pixels.to(vae.device)))


class CachedSource:
    """A source whose pictures were encoded once; every draw of latents from the kept moments is still fresh.

    Args:
        source: what was encoded; whatever is asked of it beside examples it answers itself.
        examples: its examples without their pictures, or why one cannot be used.
        moments: (N, 2C, h, w) of the VAE posterior.
    """

    def __init__(
        self, source: Source, examples: Sequence[Example | UnreadableExample], moments: Tensor
    ) -> None:
        self._source, self._examples, self._moments = source, examples, moments

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        if isinstance(example, UnreadableExample):
            raise example
        return replace(example, moments=self._moments[index])

    def caption(self, index: int) -> str:
        return self._source.caption(index)

    @property
    def validation(self) -> Source:
        return self._source.validation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while a data worker unpickles it
            raise AttributeError(name)
        return getattr(self._source, name)


@torch.no_grad()
def encode_source(source: Source, vae: Any, accelerator: Accelerator) -> CachedSource:
    """Encode every picture of a source; the processes share them, and each gets all.

    Raises:
        UserError: no picture can be used.
    """
    processes = accelerator.num_processes
    own = range(accelerator.process_index, len(source), processes)
    examples, rows = _encode_own(source, own, vae, quiet=not accelerator.is_main_process)
    gathered = accelerator.gather(accelerator.pad_across_processes(rows))
    assert isinstance(gathered, Tensor)
    # Process r encoded pictures r, r + P, ...: interleave the processes' rows again.
    rows = gathered.view(processes, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
    parts = gather_object([examples])
    ordered = [parts[i % len(parts)][i // len(parts)] for i in range(len(source))]
    return CachedSource(source, ordered, rows[: len(source)].cpu())


def _encode_own(
    source: Source, own: range, vae: Any, quiet: bool
) -> tuple[list[Example | UnreadableExample], Tensor]:
    """A process's examples without their pictures, and (N, 2C, h, w) moments: zeros of those without one."""
    examples: list[Example | UnreadableExample] = []
    moments: list[Tensor | None] = []
    with tqdm(own, desc="encoding pictures", disable=quiet, mininterval=2) as bar:
        for start in range(0, len(own), READ):
            found = [example_or_reason(source, i) for i in own[start : start + READ]]
            pixels = [e.pixels for e in found if isinstance(e, Example) and e.pixels is not None]
            encoded = iter(_encode(vae, torch.stack(pixels)) if pixels else ())
            moments += [next(encoded) if isinstance(e, Example) else None for e in found]
            examples += [replace(e, pixels=None) if isinstance(e, Example) else e for e in found]
            bar.update(len(found))
    some = next((m for m in moments if m is not None), None)
    if some is None:
        raise UserError(
            f"none of {len(own)} pictures can be used, the first because of {examples[:1]}; look at the data"
        )
    return examples, torch.stack([torch.zeros_like(some) if m is None else m for m in moments])
