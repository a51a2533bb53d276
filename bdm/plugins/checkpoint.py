"""Checkpoints: other weights for every part that the pipeline has, or their difference to SD1.5's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..formats.checkpoint import Parts, read_parts
from ..formats.noise import Noise
from ..formats.weights import resolve_folder
from .attachments import Attachments
from .kind import PluginKind, Strengths, finite
from .stack import Place, WeightDelta


class CheckpointKind(PluginKind):
    """A checkpoint's weights take the place of the pipeline's, or its difference is added to a moved UNet."""

    kind = "checkpoint"
    sources = ("checkpoint",)

    def attach(
        self, path: Path, name: str, base: str | Path | None = None, strength: float | None = None
    ) -> Strengths | None:
        """Put a checkpoint's weights in place of the pipeline's (see ``PluginKind.attach``).

        Args:
            path: the file or folder.
            name: of the plug-in.
            base: the model that the checkpoint was trained from (SD1.5): then the UNet keeps its weights, and
                the checkpoint's difference to that model is added to them. A UNet that was trained for native
                text needs this: another's weights would take back what it learned.
            strength: factor of the difference, 1 by default.
        """
        if base is None and strength is not None:
            raise UserError(f"{path}: a checkpoint takes a strength only as a difference; give base= too")
        if base is None and self.to.moved_unet:
            raise UserError(
                f"{path} would take the place of a UNet that reads native text ({self.to.moved_unet}), which"
                " would be lost; attach it as a difference: base= the SD1.5 model that it was trained from"
            )
        parts = read_parts(path)
        _refuse_other_noise(parts.noise, self.to, path)
        if self.to.without_english and "text_encoder" in parts.weights:
            self.to.leave_out(f"{len(parts.weights['text_encoder'])} weights of its text encoder are", path)
        delta = WeightDelta()
        for part in parts.weights:
            if self.to.has(part) and not (part == "unet" and base is not None):
                delta.replaced |= self.to.replacement(part, parts, path)
        if base is not None and self.to.has("unet"):
            delta.changes = self._difference(parts, path, base)
            delta.strength = self._strengths(1.0 if strength is None else strength)
        self.to.weights.put(name, delta)
        return delta.strength or None

    def _difference(
        self, parts: Parts, path: Path, base: str | Path
    ) -> dict[Place, Callable[[Tensor], Tensor]]:
        """What is added to the UNet's weights: the checkpoint's less the base's."""
        before = find_folder_or_file(base)
        origin = read_parts(before, names=("unet",))
        _refuse_other_noise(origin.noise, self.to, before)
        theirs = self.to.replacement("unet", parts, path)
        from_here = self.to.replacement("unet", origin, before)
        return {place: _change(tensor, from_here[place]) for place, tensor in theirs.items()}

    def strengths(self, name: str, strength: float, text_strength: float | None) -> Strengths:
        """Any finite number, of a checkpoint that is attached as a difference."""
        delta = self.to.weights.deltas[name]
        if not delta.changes or text_strength is not None:
            return super().strengths(name, strength, text_strength)
        return self._strengths(strength)

    @staticmethod
    def _strengths(strength: float) -> Strengths:
        return {"unet": finite(strength)}

    def set_strengths(self, name: str, strengths: Mapping[str, float]) -> None:
        """Add the difference at another strength."""
        delta = self.to.weights.deltas[name]
        self.to.weights.put(name, replace(delta, strength=dict(strengths)))

    def detach(self, name: str) -> None:
        """Give the pipeline its own weights back."""
        self.to.weights.remove(name)


def find_folder_or_file(source: str | Path) -> Path:
    """A model's file, or its folder; a hub's name too.

    Raises:
        UserError: there is none.
    """
    return Path(source) if os.path.isfile(source) else resolve_folder(source)


def _change(theirs: Tensor, base: Tensor) -> Callable[[Tensor], Tensor]:
    """The float32 difference of two weights, worked out where and when it is used."""
    return lambda weight: theirs.to(weight.device).float() - base.to(weight.device).float()


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
