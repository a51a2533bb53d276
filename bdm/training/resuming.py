"""States of a run: written so that it goes on as if nothing had happened, and refused where it would mean
something else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import RunConfig
from ..errors import UserError
from ..files import append_line
from ..parallel.pieces import Pieces
from ..parallel.together import Together
from ..parallel.whole import load_part, part_state, scattered, whole
from . import states
from .changes import Change, batch_change, check_names, corpus_change, meaning, refuse, settings_changes
from .metrics import timed
from .setup import TrainState

logger = logging.getLogger("bdm")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        evaluated: whether the last one's validation and grid, if due, are done.
        skipped: steps that were left out.
        samples: drawn so far.
        offset: where in the order of the samples the run began.
        history: what was changed on the way, and where the run began if it was another's end; a dictionary
            each.
        best: the step whose figure of one's own data is the best so far, with its value; None without.
    """

    step: int = 0
    evaluated: bool = True
    skipped: int = 0
    samples: int = 0
    offset: int = 0
    history: tuple[Mapping[str, Any], ...] = ()
    best: Mapping[str, Any] | None = None

    @property
    def best_step(self) -> int | None:
        """The step whose state is kept."""
        return self.best["step"] if self.best else None

    def at_batch(self, size: int) -> tuple[int, Progress]:
        """The number of the next batch of ``size`` samples, and the progress as it is then.

        Where batches of before had another size, the rest of one may be left out.
        """
        number = -(-(self.offset + self.samples) // size)
        return number, replace(self, offset=number * size - self.samples)


def save(
    run: RunConfig, state: TrainState, progress: Progress, writer: states.StateWriter | None = None
) -> None:
    """Write a state from which the run goes on as if nothing had happened; all processes take part.

    With a ``writer`` that works in the background training may go on: what is written is a copy.
    """
    writer = writer or states.StateWriter(background=False)
    scaler = state.accelerator.scaler
    pieces = in_pieces(run, state)
    with timed("state"):
        copy = writer.next(state.steady())
        state.gate.hold(writer.copied)
        collect = Pieces(copy) if pieces else whole(state.accelerator.is_main_process, copy)
        content = {
            **vars(progress),
            "history": [dict(entry) for entry in progress.history],
            "run": meaning(run),
            "corpus": state.corpus,
            "bucket_batch": _bucket_batch(run, state.recipe.source),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "names": state.names,
            "parts": {name: part_state(part, collect) for name, part in state.parts.items()},
            "optimizer": state.strategy.optimizer_state(state.optimizer, state.parameters, collect),
            "ema": state.ema.collected(collect),
        }
        where, kept = states_of(run), (run.keep_last, run.keep_every, progress.best_step)
        if pieces:
            own = where, progress.step, content, state.strategy.background_group(), *kept
            writer.write(*own, how=states.save_state_in_pieces)
        elif state.accelerator.is_main_process:
            writer.write(where, progress.step, content, *kept)


def states_of(run: RunConfig) -> Path | str:
    """The folder of a run's states, or its URL."""
    return run.states or run.out / "states"


def in_pieces(run: RunConfig, state: TrainState) -> bool:
    """Whether each process writes a part of a state: where weights are split, unless it is said otherwise.

    Raises:
        UserError: it is said, and cannot be.
    """
    if run.sharded_states and not state.strategy.has_pieces:
        raise UserError(
            "sharded_states: DeepSpeed's moments are gathered tensor by tensor; leave it out, or use FSDP or"
            " DDP"
        )
    several = state.accelerator.num_processes > 1
    wanted = state.strategy.splits if run.sharded_states is None else run.sharded_states
    return several and wanted


def resume(run: RunConfig, state: TrainState, allow: Sequence[str] = ()) -> Progress | None:
    """Go on from the newest state, whichever strategy and number of processes it was saved with.

    The examples, their order and all that is drawn for a sample are the same with any number of processes.
    What a model draws from the global generator (dropout) and the rounding of sums over processes are not.

    Args:
        run: the configuration.
        state: is given the state's weights, moments and average.
        allow: settings that may be others than the state's.

    Returns:
        How far it is, or None where there is no state.

    Raises:
        UserError: the folder holds a run with another configuration.
    """
    saved = states.load_state(states_of(run), Together(state.accelerator))
    if saved is None:
        check_names(allow, run)
        return None
    source = state.recipe.source
    changes = [
        *settings_changes(saved["run"], run),
        *corpus_change(saved.get("corpus"), state.corpus, source, allow),
        *batch_change(saved.get("bucket_batch"), _bucket_batch(run, source)),
    ]
    check_names(allow, run, changes)
    refuse(changes, run, allow)
    _refuse_other_parts(run, state, saved)
    _take_up(state, saved)
    progress = _noted(_progress(saved), changes)
    if changes and state.accelerator.is_main_process:
        lines = [change.text for change in changes]
        logger.warning("going on from step %d with %s", saved["step"], "; ".join(lines))
        append_line(run.out / "changes.jsonl", {"step": saved["step"], "changes": lines})
    return progress


def _progress(saved: Mapping[str, Any]) -> Progress:
    """What a state says of it; states of before say less, or call it another name."""
    batch = states.configuration(saved)["optimizer"]["batch_size"]
    return Progress(
        step=saved["step"],
        evaluated=saved.get("evaluated", saved.get("looked", True)),
        skipped=saved.get("skipped", 0),
        samples=saved.get("samples", saved["step"] * batch),
        offset=saved.get("offset", 0),
        history=tuple(saved.get("history", ())),
        best=saved.get("best"),
    )


def _noted(progress: Progress, changes: Sequence[Change]) -> Progress:
    entry = {"step": progress.step, "changes": [change.text for change in changes]}
    return replace(progress, history=(*progress.history, entry)) if changes else progress


def _refuse_other_parts(run: RunConfig, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Refuse a state of other weights, before any is taken up."""
    own = {name: part_shapes(part) for name, part in state.parts.items()}
    theirs = {name: shapes(part) for name, part in saved["parts"].items()}
    if own != theirs:
        raise UserError(
            f"{run.out} holds the states of {', '.join(theirs)}, and what is trained now is"
            f" {', '.join(own)}, or of another size: the run cannot go on; choose another out=, and begin it"
            " with init.from where the parts are the same"
        )


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of whole tensors, by name."""
    return {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}


def part_shapes(part: Any) -> dict[str, tuple[int, ...]]:
    """The same of a part that may be split."""
    return shapes(part.state_dict())


def _take_up(state: TrainState, saved: dict[str, Any]) -> None:
    """Give a state's weights, moments, average and scale to what is trained."""
    state.gate.passed()
    for name, part in state.parts.items():
        load_part(part, saved["parts"][name])
    configured = _hyperparameters(state.optimizer)
    state.strategy.load_optimizer_state(state.optimizer, state.parameters, _optimizer_state(state, saved))
    for group, values in zip(state.optimizer.param_groups, configured, strict=True):
        group.update(values)
    wholes = [saved["ema"]["average"][i] for i in _places(state, saved)]
    average = [scattered(whole, own) for whole, own in zip(wholes, state.parameters, strict=True)]
    state.ema.load_state_dict({**saved["ema"], "average": average})
    if state.accelerator.scaler is not None and saved.get("scaler"):
        state.accelerator.scaler.load_state_dict(saved["scaler"])


def _hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """What the configuration says of each group of parameters; a state would bring back its own."""
    names = ("betas", "weight_decay", "factor")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def _places(state: TrainState, saved: Mapping[str, Any]) -> list[int]:
    """Where in a state each parameter is: groups of other rates are numbered otherwise."""
    names = saved.get("names") or state.names
    places = {name: i for i, name in enumerate(names)}
    return [places[name] for name in state.names]


def _optimizer_state(state: TrainState, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state's moments by the numbers that the parameters have now."""
    places = _places(state, saved)
    groups, own = saved["optimizer"]["param_groups"], state.optimizer.param_groups
    if places == list(range(len(places))) and (len(groups) == len(own) == 1 or _sizes(groups) == _sizes(own)):
        return saved["optimizer"]
    moments = saved["optimizer"]["state"]
    numbered = {i: moments[place] for i, place in enumerate(places) if place in moments}
    return {"state": numbered, "param_groups": state.optimizer.state_dict()["param_groups"]}


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _bucket_batch(run: RunConfig, source: Any) -> int | None:
    """Samples that must come from one bucket together, over all processes.

    None where there are no buckets.
    """
    return (
        run.optimizer.batch_size // run.optimizer.accumulation
        if getattr(source, "bucket_of", None) is not None
        else None
    )
