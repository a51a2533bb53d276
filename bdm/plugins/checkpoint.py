"""Checkpoints: other weights for every part that the pipeline has."""

from __future__ import annotations

from pathlib import Path

from ..formats.checkpoint import read_parts
from .kind import PluginKind
from .stack import WeightDelta
from .vae import refuse_other_scaling


class CheckpointKind(PluginKind):
    """A checkpoint's weights take the place of the pipeline's."""

    kind = "checkpoint"
    sources = ("checkpoint",)

    def attach(self, path: Path, name: str) -> None:
        """Put a checkpoint's weights in place of the pipeline's (see ``PluginKind.attach``)."""
        parts = read_parts(path)
        refuse_other_scaling(parts, self.to, path)
        delta = WeightDelta()
        for part, weights in parts.weights.items():
            if self.to.has(part):
                delta.replaced |= self.to.replacement(part, weights, path)
        self.to.weights.put(name, delta)

    def detach(self, name: str) -> None:
        """Give the pipeline its own weights back."""
        self.to.weights.remove(name)
