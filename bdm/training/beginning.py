"""The beginning of a run: fresh, or at the end of an earlier one, as the next stage of a curriculum."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import InitConfig, RunConfig
from ..errors import UserError
from ..parallel.together import Together
from ..parallel.whole import load_part, scattered
from . import states
from .resuming import Progress, part_shapes, shapes
from .setup import TrainState

logger = logging.getLogger("bdm")


def begin(run: RunConfig, state: TrainState) -> Progress:
    """Give a fresh run what it begins with: its recipe's moments, and what ``init`` takes from another run.

    Raises:
        UserError: there is no such run, or it trained something else.
    """
    _take_moments(state, state.recipe.moments())
    if run.init is None:
        return Progress()
    saved = _read(run.init, Together(state.accelerator))
    _refuse_others(run.init, state, saved)
    _take_weights(run.init, state, saved)
    if run.init.moments:
        _take_moments(state, _moments(saved))
    entry = {"step": 0, "init": run.init.model_dump(mode="json"), "their_step": saved["step"]}
    logger.warning("beginning with %s, step %d", run.init.run, saved["step"])
    return Progress(
        offset=_position(saved) if run.init.position else 0,
        history=(*saved.get("history", ()), entry),
    )


def _read(init: InitConfig, together: Together) -> dict[str, Any]:
    """The state that a run begins with; it stays as it is."""
    path = together.by_first(lambda: states.find_state(init.run))
    if path is None:
        raise UserError(
            f"init.from: {init.run} is no state and holds none in {Path(init.run) / 'states'}; name a run's"
            " folder, that of its states, or one of them"
        )
    saved = states.read_state(path, together)
    if "names" not in saved:
        raise UserError(
            f"init.from: {path} does not say whose its weights are; go on with its run for a step, which"
            " writes its state again"
        )
    return saved


def _refuse_others(init: InitConfig, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Refuse a state of parts that this run has not; parts of its own begin as its recipe made them."""
    for name, weights in saved["parts"].items():
        own = state.parts.get(name)
        if own is None or part_shapes(own) != shapes(weights):
            raise UserError(
                f"init.from: {init.run} trained {name!r}, which is none of what this run trains"
                f" ({', '.join(state.parts)}), or of another size; give the recipe that it was trained with"
            )
    kind = states.configuration(saved)["optimizer"]["name"]
    if init.moments and kind != "adamw":
        raise UserError(
            f"init.moments: those of {init.run} are {kind}'s, and only adamw's can be taken over; set"
            " moments: false"
        )


@torch.no_grad()
def _take_weights(init: InitConfig, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Give the parts their weights, raw or averaged, and the average what it begins with."""
    for name, weights in saved["parts"].items():
        load_part(state.parts[name], weights)
    averages = dict(zip(saved["names"], saved["ema"]["average"], strict=True))
    for i, (name, own) in enumerate(zip(state.names, state.parameters, strict=True)):
        if init.weights == "averaged" and name in averages:
            own.copy_(scattered(averages[name], own))
        kept = scattered(averages[name], own) if init.averages and name in averages else own
        state.ema.set(i, kept)
    if init.averages:
        state.ema.steps = saved["ema"]["steps"]
    state.strategy.weights_changed(state.optimizer)


def _take_moments(state: TrainState, by_name: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the optimizer begin with moments, by the names of the parameters."""
    numbered = {i: dict(by_name[name]) for i, name in enumerate(state.names) if name in by_name}
    if numbered:
        state.strategy.begin_with(state.optimizer, state.parameters, numbered)


def _moments(saved: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {saved["names"][i]: values for i, values in saved["optimizer"]["state"].items()}


def _position(saved: Mapping[str, Any]) -> int:
    """Where in the order of the samples the run of a state was."""
    batch = states.configuration(saved)["optimizer"]["batch_size"]
    return saved.get("offset", 0) + saved.get("samples", saved["step"] * batch)
