"""One training step on the fake device: what it holds in memory and how many operations it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..config import RunConfig
from ..data.batch import Batch
from ..formats.weights import DTYPES
from ..models.backbone import encode_moments
from ..training.averaging import AveragedWeights
from ..training.recipes.base import Recipe
from ..training.recipes.denoising import DenoisingRecipe
from .fake_device import FakeDevice, miscounted_in_plans
from .meta_recipe import CAPTION, make_meta_recipe, picture_size

#: Labels of the fake device; the first is followed by a part's name.
ACTIVATIONS, TEMPORARY = "activations: ", "temporary"

#: Bytes of an optimizer's state for each parameter: two moments, in 8 bits or in float32; Prodigy keeps the
#: start and a sum too.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one process needs for one micro-batch.

    Attributes:
        batch: samples of the micro-batch.
        peak: most bytes in use at once, from the weights to the last temporary tensor.
        at_peak: how they were made up, by label.
        activations: bytes that the forward pass leaves for the backward pass, by the part that made them.
        validation_peak: the same as ``peak`` while validating, or 0 where that was not asked for.
        largest_convolution: most bytes of one convolution's inputs and outputs.
        parameters: of each part, by name.
        trained: names of the parts that are trained, or hold what is trained.
        trained_parameters: how many parameters are trained.
        forward: operations (a multiplication and an addition count as two) of the forward pass, by part, per
            sample.
        backward: of the backward pass, with what checkpointing works out again, per sample.
        encoding: of the pictures' and captions' encoding, which caches spare, per sample; part of ``forward``
            without them.
        uncounted: what has operations that are not in these figures, because this PyTorch's operators for it
            are not known; nothing where they are right.
        moments: shape of a sample's VAE moments, if it has any.
        features: shape of a caption's features, if it has any.
    """

    batch: int
    peak: int
    at_peak: dict[str, int]
    activations: dict[str, int]
    validation_peak: int
    largest_convolution: int
    parameters: dict[str, int]
    trained: tuple[str, ...]
    trained_parameters: int
    forward: dict[str, float]
    backward: float
    encoding: float
    uncounted: tuple[str, ...]
    moments: tuple[int, ...]
    features: tuple[int, ...]


def step_figures(run: RunConfig, batch: int, processes: int = 1, validate: bool = True) -> StepFigures:
    """Work out a step of a run with ``batch`` samples in a process.

    Args:
        run: the configuration; neither its data nor its weights need be here.
        batch: samples of a micro-batch.
        processes: with several, gradients are exchanged through buckets of their own size.
        validate: work out the validation losses too.

    Raises:
        UserError: see ``make_meta_recipe``.
    """
    return recipe_figures(make_meta_recipe(run), run, batch, processes, validate)


def recipe_figures(
    recipe: Recipe, run: RunConfig, batch: int, processes: int = 1, validate: bool = True
) -> StepFigures:
    """Work out a step of a recipe whose models have no values (see ``step_figures``)."""
    fake = FakeDevice()
    size = picture_size(run)
    fake.label = "batch"
    pixels = fake.blank(3, size, size, dtype=torch.uint8)
    parts = train_and_freeze(recipe, run.optimizer.checkpointing)
    models = recipe.models()
    owners = {module: name for name, model in reversed(models.items()) for module in model.modules()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    with fake:
        # What stays from step to step.
        trained = {id(p) for part in parts.values() for p in part.parameters()}
        fake.place(recipe, lambda p: "trained weights" if id(p) in trained else "frozen weights")
        parameters = [p for part in recipe.parts().values() for p in part.parameters()]
        _keep_beside(parameters, run, fake, processes)
        # The step.
        moments, features, encoding = _encode(recipe, pixels, fake)
        given = _batch(pixels, moments if _cached(recipe) else None, batch, fake)
        activations, forward, backward = _step(recipe, given, run, owners, fake)
        peak, at_peak = fake.peak, fake.at_peak
        validation_peak = _validation_peak(recipe, fake) if validate else 0
    return StepFigures(
        batch=batch,
        peak=peak,
        at_peak={label: size for label, size in at_peak.items() if size},
        activations=activations,
        validation_peak=validation_peak,
        largest_convolution=fake.largest_convolution,
        parameters=sizes,
        trained=tuple(sorted({owners.get(part, name) for name, part in parts.items()})),
        trained_parameters=sum(p.numel() for p in parameters),
        forward={name: count / batch for name, count in forward.items()},
        backward=backward / batch,
        encoding=encoding,
        uncounted=(*miscounted_in_plans(), *sorted(fake.operations.uncounted)),
        moments=() if moments is None else tuple(moments.shape[1:]),
        features=() if features is None else tuple(features.shape[1:]),
    )


def _step(
    recipe: Recipe, batch: Batch, run: RunConfig, owners: dict[nn.Module, str], fake: FakeDevice
) -> tuple[dict[str, int], dict[str, int], int]:
    """Forward and backward pass of a batch.

    Gives the activations and the operations of the forward pass, by part, and those of the backward pass.
    """
    fake.reset_peak()
    dtype = DTYPES.get(run.optimizer.mixed_precision)
    with _labelled(owners, fake):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = recipe(batch)["loss"]
        activations, forward = _of_parts(fake.live), _of_parts(fake.flops)
        fake.flops.clear()
        fake.label = TEMPORARY
        loss.backward()
    return activations, forward, fake.flops.total()


def train_and_freeze(recipe: Recipe, checkpointing: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Train the parts, freeze the rest, as the training loop does before its first step."""
    parts = recipe.train_parts(checkpointing)
    recipe.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return parts


def _keep_beside(parameters: list[nn.Parameter], run: RunConfig, fake: FakeDevice, processes: int) -> None:
    """Take the memory of what stays from step to step beside the weights."""
    fake.label = "moving average"
    beside = run.optimizer.ema_device == "weights"
    fake.kept = [AveragedWeights(parameters, run.optimizer.ema_decay)] if beside else []
    fake.label = "optimizer states"
    fake.kept += [
        fake.blank(p.numel(), STATE_BYTES[run.optimizer.name], dtype=torch.uint8) for p in parameters
    ]
    if processes > 1:
        fake.label = "buckets of gradients"
        fake.kept += [torch.zeros_like(p) for p in parameters]
    for parameter in parameters:
        if run.optimizer.accumulation > 1:  # the first micro-batch leaves them to the next
            fake.label = "gradients"
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.register_post_accumulate_grad_hook(lambda p: fake.relabel(p.grad, "gradients"))


def _cached(recipe: Recipe) -> bool:
    return isinstance(recipe, DenoisingRecipe) and recipe.cache


@torch.no_grad()
def _encode(recipe: Recipe, pixels: Tensor, fake: FakeDevice) -> tuple[Tensor | None, Tensor | None, float]:
    """Moments and features of one sample, and the operations of encoding them.

    A cache in the recipe is filled on the way.
    """
    if not isinstance(recipe, DenoisingRecipe):
        return None, None, 0.0
    fake.label = "encoding"
    recipe.features([""])  # what dropped captions become
    fake.flops.clear()
    moments = encode_moments(recipe.vae, pixels[None].float())
    features = recipe.features([CAPTION])
    return moments, features, fake.flops.total()


def _batch(pixels: Tensor, moments: Tensor | None, count: int, fake: FakeDevice) -> Batch:
    fake.label = "batch"
    return Batch(
        pixels=pixels.expand(count, -1, -1, -1).clone() if moments is None else None,
        moments=None if moments is None else moments.expand(count, -1, -1, -1).clone(),
        captions=[CAPTION] * count,
        prepared_text=None,
        indices=list(range(count)),
        generators=[torch.Generator().manual_seed(i) for i in range(count)],
        english=[CAPTION] * count,
        bilingual=[None] * count,
    )


@contextmanager
def _labelled(owners: dict[nn.Module, str], fake: FakeDevice) -> Iterator[None]:
    """Label memory and operations by the part whose code runs, as long as nobody sets another label."""
    stack = ["loss"]
    fake.label = ACTIVATIONS + "loss"
    fake.flops.clear()

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(owners.get(module, stack[-1]))
        relabel()

    def leave(*_: Any) -> None:
        stack.pop()
        relabel()

    def relabel() -> None:
        if fake.label != TEMPORARY:  # a checkpoint runs modules again in the backward pass
            fake.label = ACTIVATIONS + stack[-1]

    handles = [
        all_modules.register_module_forward_pre_hook(enter),
        all_modules.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_parts(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        label.removeprefix(ACTIVATIONS): n
        for label, n in counts.items()
        if n and label.startswith(ACTIVATIONS)
    }


def _validation_peak(recipe: Recipe, fake: FakeDevice) -> int:
    for parameter in recipe.parameters():
        parameter.grad = None
    fake.label = TEMPORARY
    fake.reset_peak()
    recipe.eval().validate()
    return fake.peak
