"""Real pictures -> the classifier that scores generated ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch, fixed_batch
from ..data.emoji import COLOUR_NAMES, EmojiSource
from ..data.source import to_unit_range
from ..errors import UserError
from ..evaluate.judge import JudgeModel, augment
from .base import Recipe

LOOKS = ("twemoji", "openmoji")


class JudgeRecipe(Recipe):
    """Cross-entropy of concept, background colour and look on augmented real pictures.

    Args:
        source: the emoji world in both looks.
        width: see ``JudgeModel``.
        seed: seed of the weights.
    """

    def __init__(self, source: EmojiSource, width: int = 32, seed: int = 0) -> None:
        if set(source.looks or ()) != set(LOOKS):
            raise UserError(f"data.looks is {source.looks}; a judge must see both looks: set looks: [twemoji, openmoji]")
        super().__init__(source, seed)
        self.rows = source.rows
        torch.manual_seed(seed)
        self.judge = JudgeModel(len(source.world.concepts), len(COLOUR_NAMES), width, source.size)

    def parts(self) -> dict[str, nn.Module]:
        return {"judge": self.judge}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pixels is not None
        rows = [self.rows[i] for i in batch.indices]
        labels = torch.tensor([(r.concept, COLOUR_NAMES.index(r.colour), LOOKS.index(r.look)) for r in rows])
        verdict = self.judge(augment(to_unit_range(batch.pixels), batch.generators))
        concept, colour, look = labels.unbind(1)
        loss = F.cross_entropy(verdict.concept, concept) + 0.3 * (
            F.cross_entropy(verdict.colour, colour) + F.cross_entropy(verdict.look, look)
        )
        hits = {name: (getattr(verdict, name).argmax(1) == label).float().mean() for name, label in
                (("concept", concept), ("colour", colour), ("look", look))}  # fmt: skip
        return {"loss": loss, **hits}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on augmentations never used in training (their seeds lie outside the training stream)."""
        return {name: value.item() for name, value in self(fixed_batch(self.source, 1280, seed=-1 - self.seed)).items()}

    def save(self, folder: Path) -> None:
        self.judge.save_pretrained(folder)
