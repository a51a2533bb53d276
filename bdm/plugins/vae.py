"""VAEs: from a file of their own, or out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..formats.checkpoint import read_vae
from .kind import PluginKind
from .stack import WeightDelta


class VaeKind(PluginKind):
    """A VAE's weights take the place of the pipeline's."""

    kind = "vae"
    sources = ("vae", "checkpoint")

    def attach(self, path: Path, name: str) -> None:
        """Put a VAE's weights in place of the pipeline's (see ``PluginKind.attach``)."""
        parts = read_vae(path)
        delta = WeightDelta(replaced=self.to.replacement("vae", parts, path))
        self.to.weights.put(name, delta)

    def detach(self, name: str) -> None:
        """Give the pipeline its own VAE back."""
        self.to.weights.remove(name)
