"""Real pictures -> the classifier that scores generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batch import Batch, fixed_batch
from ...data.source import to_unit_range
from ...emoji.judge import Architecture, JudgeModel
from ...emoji.world import COLOUR_NAMES, LOOKS, EmojiSource, Row, Treatment
from ...errors import UserError
from .base import Recipe


def row_labels(rows: Sequence[Row], treatments: Sequence[Treatment]) -> dict[str, Tensor]:
    """What a judge of these treatments should say of rows of the world, by head: (B,) class numbers."""
    classes = {
        "concept": [row.concept for row in rows],
        "colour": [COLOUR_NAMES.index(row.colour) for row in rows],
        "look": [LOOKS.index(row.look) for row in rows],
        "treatment": [treatments.index(row.treatment) for row in rows],
    }
    return {name: torch.tensor(numbers) for name, numbers in classes.items()}


class JudgeRecipe(Recipe):
    """Cross-entropy of concept, background colour, look and treatment on augmented real pictures.

    Args:
        source: the emoji world in both looks, in the treatments to be told apart.
        width: see ``JudgeModel``.
        architecture: likewise; it decides the augmentation, too.
        seed: seed of the weights.
    """

    def __init__(
        self,
        source: EmojiSource,
        width: int = 32,
        architecture: Architecture = "convolutional",
        seed: int = 0,
    ) -> None:
        if set(source.looks or ()) != set(LOOKS):
            raise UserError(
                f"data.looks is {source.looks}; a judge must see both looks: set looks: [twemoji, openmoji]"
            )
        super().__init__(source, seed)
        self.rows, self.treatments = source.rows, source.treatments
        torch.manual_seed(seed)
        self.judge = JudgeModel(
            len(source.world.concepts),
            len(COLOUR_NAMES),
            width,
            source.size,
            source.treatments,
            architecture,
        )

    def parts(self) -> dict[str, nn.Module]:
        return {"judge": self.judge}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        device = next(self.judge.parameters()).device
        rows = [self.rows[i] for i in batch.indices]
        labels = {name: label.to(device) for name, label in row_labels(rows, self.treatments).items()}
        # Augmentations are drawn from the samples' own generators, which are the CPU's.
        verdict = self.judge(self.judge.augment(to_unit_range(batch.pixels), batch.generators).to(device))
        losses = {name: F.cross_entropy(getattr(verdict, name), label) for name, label in labels.items()}
        # The concept is by far the hardest.
        loss = losses.pop("concept") + 0.3 * torch.stack(list(losses.values())).sum()
        hits = {
            name: (getattr(verdict, name).argmax(1) == label).float().mean() for name, label in labels.items()
        }
        return {"loss": loss, **hits}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on augmentations never used in training (their seeds lie outside the training stream)."""
        return {
            name: value.item()
            for name, value in self(fixed_batch(self.source, 1280, seed=-1 - self.seed)).items()
        }

    def save(self, folder: Path) -> None:
        self.judge.save_pretrained(folder)
