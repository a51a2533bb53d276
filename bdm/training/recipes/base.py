"""The contract between the training loop and what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ...data.batch import Batch, fixed_batch
from ...data.source import Source
from ...errors import UserError
from ...parallel.processes import Share
from .terms import mean_of

#: Examples of a validation.
VALIDATED = 64


class Recipe(nn.Module):
    """What a run trains and with which loss. Subclasses hold every model they need as sub-modules.

    The loop asks only for what stands here: which parts receive gradients, the loss of a batch, the
    validation figures, a picture to look at and how the result is saved.

    Args:
        source: the examples.
        seed: of the run.

    Attributes:
        divisible: whether what ``forward`` says of a batch is the mean of what it says of its samples one by
            one, all of them scalars, so that processes can share a validation.
    """

    divisible = False

    def __init__(self, source: Source, seed: int = 0) -> None:
        super().__init__()
        self.source = source
        self.seed = seed
        #: Most pictures of a sample grid.
        self.grid_size = 24
        #: Of validation and grids, where several processes train.
        self.share = Share()

    def parts(self) -> dict[str, nn.Module]:
        """The sub-modules that are trained, by name. Everything else must be frozen."""
        raise NotImplementedError

    def models(self) -> dict[str, nn.Module]:
        """All models that take part, by name, for reports."""
        return dict(self.named_children())

    def train_parts(self, recomputed: Sequence[str] = ()) -> dict[str, nn.Module]:
        """Let every part train and freeze everything else; gives the parts.

        Args:
            recomputed: see ``recompute_activations``.
        """
        self.requires_grad_(False)
        parts = self.parts()
        for part in parts.values():
            part.requires_grad_(True).train()
        self.recompute_activations(recomputed)
        return parts

    def recomputable(self) -> dict[str, Any]:
        """Models of diffusers or transformers, by name, that can compute activations again in the backward
        pass.
        """
        return {}

    def recompute_activations(self, names: Sequence[str]) -> None:
        """Spend time to save memory: gradient checkpointing (arXiv 1604.06174) in the models of these names.

        Raises:
            UserError: a name that the recipe does not know.
        """
        models = self.recomputable()
        for name in names:
            if name not in models:
                raise UserError(
                    f"optimizer.checkpointing names {name!r}; this recipe knows"
                    f" {', '.join(models) or 'none'}: correct or remove it"
                )
            model = models[name]
            # One library's name for it, and the other's.
            ways = ("enable_gradient_checkpointing", "gradient_checkpointing_enable")
            recompute = next(found for way in ways if (found := getattr(model, way, None)) is not None)
            recompute()

    def fill_caches(self, accelerator: Accelerator) -> None:
        """Work before the first step that needs the device, of a run that nothing refuses any more."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of a batch: ``"loss"``, which is minimised, and whatever else is worth logging."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses on examples that training never sees, with fixed noise, so that every call is comparable.

        The processes share the examples where they can (see ``divisible``), and each has all figures.
        """
        if not self.divisible:
            batch = fixed_batch(self.source.validation, VALIDATED, self.seed)
            return {name: mean_of(term) for name, term in self(batch).items()}
        batch, count = self.fixed_share(VALIDATED, self.seed)
        return {name: self.share.mean(term.float() * count, count) for name, term in self(batch).items()}

    def fixed_share(self, count: int, seed: int) -> tuple[Batch, int]:
        """This process's share of ``count`` validation examples, and how many of them count."""
        own: list[int] = []

        def part(of: int) -> range:
            own.append(self.share.own(of))
            return self.share.part(of)

        batch = fixed_batch(self.source.validation, count, seed, part)
        return batch, len(batch) if own[0] else 0

    def grid(self) -> Image.Image | None:
        """A picture that shows what the parts can do now."""
        return None

    def draw(self, prompts: Sequence[str], guidance: float, seed: int) -> Tensor | None:
        """Pictures (N, 3, H, W) in [-1, 1] of N texts, or None where nothing is drawn from texts.

        Picture i uses ``seed`` + i. The processes share them, and each gets all.
        """
        return None

    def finish(self) -> None:
        """Work behind the last step that runs the trained parts.

        Every process takes part, with the averaged weights.
        """

    def moments(self) -> Mapping[str, Mapping[str, Any]]:
        """What the optimizer of a fresh run begins with, by the parameter's name ("PART.NAME").

        Whatever is not named begins without.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """What the card of the finished model says beside how it was trained."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the trained parts for use."""
        raise NotImplementedError
