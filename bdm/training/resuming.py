"""States of a run: written so that it goes on as if nothing had happened, and refused where it would mean
something else.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..config import RunConfig
from ..errors import UserError
from ..parallel.processes import gathered, load_part, scattered
from . import states
from .metrics import timed
from .setup import Work


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        looked: whether the last one's validation and grid, if due, are done.
        skipped: steps that were left out.
    """

    step: int = 0
    looked: bool = True
    skipped: int = 0


def save(run: RunConfig, work: Work, progress: Progress) -> None:
    """Write a state from which the run goes on as if nothing had happened; all processes take part."""
    main, scaler = work.accelerator.is_main_process, work.accelerator.scaler
    with timed("state"):
        state = {
            **vars(progress),
            "run": _meaning(run),
            "bucket_batch": _bucket_batch(run, work.recipe.source),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "parts": {name: gathered(part.state_dict(), main) for name, part in work.parts.items()},
            "optimizer": work.ways.optimizer_state(work.optimizer, work.parameters),
            "ema": gathered(work.ema.state_dict(), main),
        }
        if main:
            states.save_state(run.out / "states", progress.step, state, run.keep_last, run.keep_every)


def resume(run: RunConfig, work: Work) -> Progress:
    """Go on from the newest state, whichever way and number of processes it was saved with.

    Returns how far it is.

    The examples, their order and all that is drawn for a sample are the same with any number of processes.
    What a model draws from the global generator (dropout) and the rounding of sums over processes are not.

    Raises:
        UserError: the folder holds a run with another configuration.
    """
    state = states.load_state(run.out / "states")
    if state is None:
        return Progress()
    if changes := _differences(_saved_meaning(state["run"], run), json.loads(_meaning(run))):
        raise UserError(
            f"{run.out} holds a run with another configuration, and going on would mix the two"
            f" ({'; '.join(changes)}); choose another out=, set the values back, or delete the folder"
        )
    saved, own = state.get("bucket_batch"), _bucket_batch(run, work.recipe.source)
    if saved not in (None, own):
        raise UserError(
            f"{run.out} was run with batches of {saved} samples of one bucket, and now they would have {own},"
            " so that others come together; keep batch_size / accumulation as it was"
        )
    for name, part in work.parts.items():
        load_part(part, state["parts"][name])
    work.ways.load_optimizer_state(work.optimizer, work.parameters, state["optimizer"])
    average = [
        scattered(saved, own) for saved, own in zip(state["ema"]["average"], work.ema.average, strict=True)
    ]
    work.ema.load_state_dict({**state["ema"], "average": average})
    if work.accelerator.scaler is not None and state.get("scaler"):
        work.accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(state["step"], state.get("looked", True), state.get("skipped", 0))


def _bucket_batch(run: RunConfig, source: Any) -> int | None:
    """Samples that must come from one bucket together, over all processes.

    None where there are no buckets.
    """
    return (
        run.optimizer.batch_size // run.optimizer.accumulation
        if getattr(source, "bucket_of", None) is not None
        else None
    )


def _meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as JSON."""
    ignored: Any = dict.fromkeys(
        (
            "out",
            "threads",
            "workers",
            "log_every",
            "validate_every",
            "grid_every",
            "checkpoint_every",
            "keep_last",
            "keep_every",
            "skip_limit",
            "unreadable_limit",
            "trackers",
        ),
        True,
    )
    # How a step is divided changes its rounding only; fewer processes need more accumulation.
    ignored["optimizer"] = {"accumulation", "checkpointing"}
    ignored["recipe"], ignored["data"] = {"grid_prompts", "grid_guidance"}, {"cache"}
    return run.model_dump_json(exclude=ignored)


def _saved_meaning(saved: str, run: RunConfig) -> Any:
    """A state's configuration, with the defaults of settings that did not exist when it was saved."""
    old = json.loads(saved)
    with suppress(ValidationError):
        return json.loads(_meaning(RunConfig.model_validate(old | {"out": run.out})))
    return old


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two configurations: "optimizer.steps: 100 -> 200"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{name}: {old} -> {new}"]
