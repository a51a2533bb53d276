"""A run's look at itself on one's own texts and pictures: what it draws of them, scored by other models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..config import EvaluationConfig, RunConfig
from ..data.batch import fixed_batch
from ..data.source import to_pixels
from ..drawing.grid import labelled_grid
from ..drawing.prompt_file import read_prompt_file
from ..errors import UserError
from ..models.picture_scores import SMALLER_IS_BETTER, PictureScores
from .metrics import log_picture
from .recipes.base import Recipe
from .recipes.preview import spread_captions

logger = logging.getLogger("bdm")

#: Pictures that are shown.
SHOWN = 24


class OwnData:
    """Draws the same texts with the same noise whenever it is asked, and scores the pictures.

    Args:
        config: what is drawn and how it is scored.
        recipe: draws.
        accelerator: joins the processes; the first one scores.
        out: the run folder, for the grids.
        seed: of the first picture.

    Raises:
        UserError: no texts, no pictures to compare with, or a scorer that cannot be read.
    """

    def __init__(
        self, config: EvaluationConfig, recipe: Recipe, accelerator: Any, out: Path, seed: int
    ) -> None:
        if type(recipe).draw is Recipe.draw:
            raise UserError(
                "evaluation: this recipe draws nothing from texts that could be scored; leave it out"
            )
        self._config, self._recipe, self._accelerator = config, recipe, accelerator
        self._out, self._seed = out, seed
        self._prompts = _prompts(config, recipe)
        self._scores, self._real = None, None
        if accelerator.is_main_process:
            self._scores = PictureScores(config.scorer, config.features, accelerator.device)
            self._real = _real(config, recipe, seed) if config.features else None

    def due(self, done: int) -> bool:
        """Whether it is time after so many steps."""
        return not done % self._config.every

    @torch.no_grad()
    def look(self, done: int) -> dict[str, float]:
        """The figures by the names of their rows, in every process; joint work."""
        pictures = self._recipe.draw(self._prompts, self._config.guidance, self._seed)
        assert pictures is not None
        box: list[Any] = [None]
        if self._scores is not None:
            drawn = to_pixels(pictures.cpu())
            box[0] = self._scores(drawn, self._prompts, [] if self._real is None else list(self._real))
            grid = labelled_grid(drawn[:SHOWN], self._prompts[:SHOWN], columns=8, scale=1)
            log_picture(self._accelerator, self._out, grid, done, "own")
        if self._accelerator.num_processes > 1:
            broadcast_object_list(box)
        return {f"own/{name}": value for name, value in box[0].items()}

    def better(self, figures: Mapping[str, float], best: Mapping[str, Any] | None, done: int) -> Any:
        """The best step and its value, now that there are these figures."""
        name = self._config.best
        value = figures.get(f"own/{name}")
        if value is None or value != value:
            return best
        if best is not None and best["figure"] == name:
            gain = value - best["value"]
            if (-gain if name in SMALLER_IS_BETTER else gain) <= 0:
                return best
        return {"figure": name, "step": done, "value": value}


def own_data(run: RunConfig, recipe: Recipe, accelerator: Any) -> OwnData | None:
    """What a configuration asks for; None where it does not."""
    return OwnData(run.evaluation, recipe, accelerator, run.out, run.seed) if run.evaluation else None


def _prompts(config: EvaluationConfig, recipe: Recipe) -> list[str]:
    if isinstance(config.prompts, str):
        rows = read_prompt_file(Path(config.prompts))
        texts = [row.said["prompt"] for row in rows if "prompt" in row.said]
        if len(texts) < len(rows):
            logger.warning(
                "%s: %d of %d rows hold no prompt", config.prompts, len(rows) - len(texts), len(rows)
            )
    else:
        texts = [*config.prompts] or spread_captions(recipe.source.validation, config.count)
    if not texts:
        raise UserError("evaluation.prompts: there are none, nor validation captions; give some")
    return texts[: config.count]


def _real(config: EvaluationConfig, recipe: Recipe, seed: int) -> Tensor:
    pixels = fixed_batch(recipe.source.validation, config.count, seed).pixels
    if pixels is None or len(pixels) < 2:
        raise UserError(
            "evaluation.features: FID and KID compare with validation pictures, and these data hold"
            f" {0 if pixels is None else len(pixels)}; leave features out, or train on raw pictures"
        )
    return pixels
