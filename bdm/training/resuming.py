"""States of a run: written so that it goes on as if nothing had happened, and refused where it would mean
something else.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..config import RunConfig
from ..errors import UserError
from ..files import append_line
from ..parallel.whole import gathered, load_part, part_state, scattered
from . import states
from .metrics import timed
from .setup import TrainState

logger = logging.getLogger("bdm")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        evaluated: whether the last one's validation and grid, if due, are done.
        skipped: steps that were left out.
    """

    step: int = 0
    evaluated: bool = True
    skipped: int = 0


def save(run: RunConfig, state: TrainState, progress: Progress) -> None:
    """Write a state from which the run goes on as if nothing had happened; all processes take part."""
    main, scaler = state.accelerator.is_main_process, state.accelerator.scaler
    with timed("state"):
        content = {
            **vars(progress),
            "run": _meaning(run),
            "corpus": state.corpus,
            "bucket_batch": _bucket_batch(run, state.recipe.source),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "names": state.names,
            "parts": {name: part_state(part) for name, part in state.parts.items()},
            "optimizer": state.strategy.optimizer_state(state.optimizer, state.parameters),
            "ema": gathered(state.ema.state_dict(), main),
        }
        if main:
            states.save_state(run.out / "states", progress.step, content, run.keep_last, run.keep_every)


def resume(run: RunConfig, state: TrainState) -> Progress:
    """Go on from the newest state, whichever strategy and number of processes it was saved with.

    Returns how far it is.

    The examples, their order and all that is drawn for a sample are the same with any number of processes.
    What a model draws from the global generator (dropout) and the rounding of sums over processes are not.

    Raises:
        UserError: the folder holds a run with another configuration.
    """
    saved = states.load_state(run.out / "states")
    if saved is None:
        _begin(state)
        return Progress()
    _refuse_changes(run, saved, state.accelerator.is_main_process)
    _refuse_other_data(run, saved.get("corpus"), state.corpus, state.recipe.source)
    _refuse_other_batches(run, saved.get("bucket_batch"), _bucket_batch(run, state.recipe.source))
    _take_up(state, saved)
    # States of before called it another name, or did not say.
    evaluated = saved.get("evaluated", saved.get("looked", True))
    return Progress(saved["step"], evaluated, saved.get("skipped", 0))


def _begin(state: TrainState) -> None:
    """Give a fresh run's optimizer the moments that its recipe begins with."""
    by_name = state.recipe.moments()
    numbered = {i: dict(by_name[name]) for i, name in enumerate(state.names) if name in by_name}
    if numbered:
        state.strategy.begin_with(state.optimizer, state.parameters, numbered)


def _refuse_changes(run: RunConfig, saved: dict[str, Any], note: bool) -> None:
    """Refuse what would mix two runs; note what may be changed on the way."""
    old, new = _saved_meaning(saved["run"], run), json.loads(_meaning(run))
    allowed = _may_change(old, new)
    changes = _differences(old, new)
    if refused := [change for change in changes if change.partition(":")[0] not in allowed]:
        raise UserError(
            f"{run.out} holds a run with another configuration, and going on would mix the two"
            f" ({'; '.join(refused)}); choose another out=, set the values back, or delete the folder"
        )
    if changes and note:
        logger.warning("going on from step %d with %s", saved["step"], "; ".join(changes))
        append_line(run.out / "changes.jsonl", {"step": saved["step"], "changes": changes})


def _may_change(old: Any, new: Any) -> set[str]:
    """Settings that a run may go on with otherwise than it began.

    Where the data lie says nothing of what they are, which is checked by itself. At a constant learning rate
    no step depends on how many are to come, and each has the rate that it is given.
    """
    allowed = {"data.urls", "data.path"}
    if old["optimizer"]["schedule"] == new["optimizer"]["schedule"] == "constant":
        allowed |= {"optimizer.steps", "optimizer.learning_rate"}
    return allowed


def _refuse_other_data(run: RunConfig, saved: str | None, own: str, source: Any) -> None:
    if saved not in (None, own):
        compare = getattr(source, "changes_since", None)
        changes = "; ".join(compare(saved)) if compare and saved else ""
        raise UserError(
            f"{run.out} was run on other data ({saved}; now {own}{'; ' * bool(changes)}{changes}), so their"
            " order is another, and going on would repeat some and leave out others; give it the same data,"
            " or choose another out="
        )


def _refuse_other_batches(run: RunConfig, saved: int | None, own: int | None) -> None:
    if saved not in (None, own):
        raise UserError(
            f"{run.out} was run with batches of {saved} samples of one bucket, and now they would have {own},"
            " so that others come together; keep batch_size / accumulation as it was"
        )


def _take_up(state: TrainState, saved: dict[str, Any]) -> None:
    """Give a state's weights, moments, average and scale to what is trained."""
    for name, part in state.parts.items():
        load_part(part, saved["parts"][name])
    state.strategy.load_optimizer_state(state.optimizer, state.parameters, saved["optimizer"])
    pairs = zip(saved["ema"]["average"], state.ema.average, strict=True)
    state.ema.load_state_dict({**saved["ema"], "average": [scattered(whole, own) for whole, own in pairs]})
    if state.accelerator.scaler is not None and saved.get("scaler"):
        state.accelerator.scaler.load_state_dict(saved["scaler"])


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
            "read_limit",
            "trackers",
        ),
        True,
    )
    # How a step is divided changes its rounding only; fewer processes need more accumulation.
    ignored["optimizer"] = {"accumulation", "checkpointing"}
    ignored["recipe"] = {"grid_prompts", "grid_guidance"}
    # Where data are kept, and which faults are borne, says nothing of what they are.
    kept = {"cache", "shard_limit", "index", "local", "local_gb"}
    ignored["data"] = dict.fromkeys(kept, True) | {"parts": {"__all__": {"data": kept}}}
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
