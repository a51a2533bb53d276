"""Checkpoints: other weights for every part that the pipeline has."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..formats.checkpoint import read_parts
from ..formats.noise import Noise
from .attachments import Attachments
from .kind import PluginKind
from .stack import WeightDelta


class CheckpointKind(PluginKind):
    """A checkpoint's weights take the place of the pipeline's."""

    kind = "checkpoint"
    sources = ("checkpoint",)

    def attach(self, path: Path, name: str) -> None:
        """Put a checkpoint's weights in place of the pipeline's (see ``PluginKind.attach``)."""
        parts = read_parts(path)
        _refuse_other_noise(parts.noise, self.to, path)
        delta = WeightDelta()
        for part in parts.weights:
            if self.to.has(part):
                delta.replaced |= self.to.replacement(part, parts, path)
        self.to.weights.put(name, delta)

    def detach(self, name: str) -> None:
        """Give the pipeline its own weights back."""
        self.to.weights.remove(name)


def _refuse_other_noise(noise: Noise, to: Attachments, path: Path) -> None:
    """Refuse a UNet that predicts something else than the pipeline takes it for, or on another schedule.

    Raises:
        UserError: names what differs.
    """
    if to.has("unet") and (different := noise.differences(to.noise)):
        raise UserError(
            f"{path} is made for {'; '.join(different)}, which this pipeline's scheduler is set to; load it"
            " as the backbone (backbone=), or give the pipeline a scheduler of its kind first"
        )
