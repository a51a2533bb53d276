"""A run's recipe without weights and without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import RecipeConfig, RunConfig, StartConfig
from ..data.source import Example, Source
from ..errors import UserError
from ..training.recipes.base import Recipe
from ..training.recipes.build import build_recipe, build_source
from ..training.recipes.native_encoder import Start
from .fake_device import FakeDevice
from .meta_models import make_meta_backbone, make_meta_native_text_encoder, make_meta_part

#: A caption of usual length: one chunk of tokens.
CAPTION = "红灯笼"


class BlankSource:
    """Examples of the right shape in place of data that may lie elsewhere."""

    def __init__(self, example: Example, real: Source | None = None) -> None:
        self._example, self._real = example, real

    def __len__(self) -> int:
        return 1 << 20 if self._real is None else len(self._real)

    def __getitem__(self, index: int) -> Example:
        return self._example

    def caption(self, index: int) -> str:
        return CAPTION

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def validation(self) -> BlankSource:
        return self


def picture_size(run: RunConfig) -> int:
    """Side of a run's pictures in pixels.

    That of the square where they come in buckets, whose areas are the same at most.

    Raises:
        UserError: the pictures were prepared, and what their sizes were is not in the configuration.
    """
    if run.data.kind == "prepared" or (run.data.kind == "mix" and run.data.prepared):
        raise UserError(
            "data.kind is prepared; plan the run on the raw data that were prepared: its table shows the"
            " speed from caches too"
        )
    if run.data.kind == "module":
        raise UserError(
            "data.kind is module, whose pictures' size a plan does not know; plan the run with another kind"
            " of data"
        )
    return run.data.size


def make_meta_recipe(run: RunConfig) -> Recipe:
    """A run's recipe on the meta device; its examples are blank.

    Raises:
        UserError: a model's configuration is not known, or the recipe cannot be planned.
    """
    if run.recipe.kind == "contrastive":
        raise UserError(
            "recipe.kind is contrastive, whose loss picks pairs by their values, and a plan has shapes only; "
            "train.py --dry-run goes through a real step"
        )
    if run.recipe.kind == "branch" and run.recipe.pool is not None and run.recipe.pool.files:
        raise UserError(
            "recipe.pool has files, whose changes of weights a plan without weights cannot work out; plan the"
            " run with recipe.pool.files=[] and recipe.pool.rank=1, which goes through the same steps, and"
            " add the size of the weights that they change"
        )
    if run.recipe.kind == "module":
        raise UserError(
            "recipe.kind is module, whose models a plan does not know; train.py --dry-run goes through a real"
            " step"
        )
    size = picture_size(run)
    pixels = torch.zeros(3, size, size, dtype=torch.uint8)
    # The judge's labels come from the world's rows.
    real = build_source(run.data) if run.recipe.kind == "judge" else None
    ready = make_meta_models(run.recipe)
    with FakeDevice(), torch.device("meta"):
        return build_recipe(run, BlankSource(Example(CAPTION, pixels, english=CAPTION), real), **ready)


def make_meta_models(config: RecipeConfig) -> dict[str, Any]:
    """The models that a recipe would load, on the meta device, by the recipe's argument.

    An untrained text encoder is left to the recipe, which makes it without reading anything but its
    vocabulary.

    Raises:
        UserError: a model is neither here nor known, nor does the hub give its configuration.
    """
    makers: dict[str, Callable[[str], Any]] = {
        "backbone": make_meta_backbone,
        "native_text_encoder": make_meta_native_text_encoder,
        "vae": lambda source: make_meta_part("vae", source),
        "text_encoder": lambda source: make_meta_part("text_encoder", source),
    }
    if (start := getattr(config, "start", None)) is not None:
        return _begun(start)
    return {
        name: make(source)
        for name, make in makers.items()
        if isinstance(source := getattr(config, name, None), str)
    }


def _begun(start: str | StartConfig) -> dict[str, Any]:
    """The models of an earlier run, which is none of the plan's any more.

    Raises:
        UserError: it has none.
    """
    folder = Start(start if isinstance(start, str) else start.run).model
    native = make_meta_native_text_encoder(str(folder / "native_text_encoder"))
    return {"backbone": make_meta_backbone(str(folder)), "native_text_encoder": native, "start": None}
