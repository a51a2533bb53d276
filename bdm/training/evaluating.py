"""What a run says of itself on the way: validation losses and sample grids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import RunConfig
from .metrics import log_picture, log_row, timed
from .own_data import OwnData
from .plots import plot_metrics
from .recipes.base import Recipe
from .setup import TrainState


def evaluate(run: RunConfig, state: TrainState, done: int, own: OwnData | None = None) -> dict[str, float]:
    """Validation losses and the sample grid, with the averaged weights, after steps where they are due.

    Returns the figures of one's own data (see ``OwnData``), nothing where they are not due.
    """
    last = done == run.optimizer.steps
    validate, draw = last or done % run.validate_every == 0, last or done % run.grid_every == 0
    look = own is not None and (last or own.due(done))
    if not (validate or draw or look):
        return {}
    # Evaluations take other batch sizes than training, and compiling for each would take longer than they do.
    with _evaluating(state.recipe), state.ema.applied(), torch.compiler.set_stance("force_eager"):
        if validate:
            _validate(run, state, done)
        if draw:
            _draw(run, state, done)
        return _look(run, state, done, own) if own is not None and look else {}


@contextmanager
def _evaluating(recipe: Recipe) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own again: frozen models stay in it."""
    modes = [(module, module.training) for module in recipe.modules()]
    recipe.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _validate(run: RunConfig, state: TrainState, done: int) -> None:
    with timed("validation"):
        figures = {f"validation/{name}": value for name, value in state.recipe.validate().items()}
    log_row(state.accelerator, run.out, {"step": done, **figures})
    if state.accelerator.is_main_process:
        plot_metrics(run.out)


def _look(run: RunConfig, state: TrainState, done: int, own: OwnData) -> dict[str, float]:
    with timed("own data"):
        figures = own.look(done)
    log_row(state.accelerator, run.out, {"step": done, **figures})
    if state.accelerator.is_main_process:
        plot_metrics(run.out)
    return figures


def _draw(run: RunConfig, state: TrainState, done: int) -> None:
    with timed("grid"):
        picture = state.recipe.grid()
    if picture is not None:
        log_picture(state.accelerator, run.out, picture, done)
