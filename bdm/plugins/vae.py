"""VAEs: from a file of their own, or out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..formats.checkpoint import Parts, read_vae
from .attachments import Attachments
from .kind import PluginKind
from .stack import WeightDelta


class VaeKind(PluginKind):
    """A VAE's weights take the place of the pipeline's."""

    kind = "vae"
    sources = ("vae", "checkpoint")

    def attach(self, path: Path, name: str) -> None:
        """Put a VAE's weights in place of the pipeline's (see ``PluginKind.attach``)."""
        parts = read_vae(path)
        delta = WeightDelta(replaced=self.to.replacement("vae", parts.weights["vae"], path))
        refuse_other_scaling(parts, self.to, path)
        self.to.weights.put(name, delta)

    def detach(self, name: str) -> None:
        """Give the pipeline its own VAE back."""
        self.to.weights.remove(name)


def refuse_other_scaling(parts: Parts, to: Attachments, path: Path) -> None:
    """Refuse a VAE whose latents have another scale: the UNet would read them wrongly.

    Raises:
        UserError: names both scales.
    """
    theirs = parts.configs.get("vae", {}).get("scaling_factor")
    if not to.has("vae") or theirs is None or "vae" not in parts.weights:
        return
    if theirs != (ours := to.pipe.vae.config["scaling_factor"]):
        raise UserError(
            f"{path} scales latents by {theirs} and this pipeline by {ours}; use a VAE of the same model"
            " family"
        )
