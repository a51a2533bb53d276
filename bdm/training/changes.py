"""What changed in a run between its last state and now, and which of it may have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from ..config import RunConfig
from ..errors import UserError

#: Settings that say nothing of what comes out.
_OUTSIDE = (
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
    "collective_timeout",
    "time_limit",
    "peak_tflops",
    "profile",
    "states",
    "background_states",
    "sharded_states",
    "evaluation",
)

#: Where data are kept, and which faults are borne, says nothing of what they are.
_KEPT = {"cache", "shard_limit", "index", "local", "local_gb"}

#: Other values of these are another model or another optimizer, whose states mean something else.
_NEVER = ("recipe.kind", "optimizer.name")


@dataclass(frozen=True)
class Change:
    """A difference between a run's state and its configuration or data.

    Attributes:
        names: the settings, any of which it may be allowed by.
        text: what is told of it, such as "optimizer.steps: 100 -> 200".
        at_once: whether it does not change the meaning of the steps before and behind it.
    """

    names: tuple[str, ...]
    text: str
    at_once: bool = False

    def allowed_by(self, names: Sequence[str]) -> bool:
        """Whether one of the given names is its setting's, or that of the group around it."""
        if any(own in _NEVER for own in self.names):
            return False
        return self.at_once or any(_covers(name, own) for name in names for own in self.names)


def _covers(name: str, setting: str) -> bool:
    return setting == name or setting.startswith(f"{name}.")


def meaning(run: RunConfig) -> str:
    """The part of a configuration that decides the result, as JSON."""
    ignored: Any = dict.fromkeys(_OUTSIDE, True)
    # How a step is divided changes its rounding only; fewer processes need more accumulation.
    ignored["optimizer"] = {"accumulation", "checkpointing", "ema_device"}
    ignored["recipe"] = {"grid_prompts", "grid_guidance"}
    ignored["data"] = dict.fromkeys(_KEPT, True) | {"parts": {"__all__": {"data": _KEPT}}}
    return run.model_dump_json(exclude=ignored)


def settings_changes(saved: str, run: RunConfig) -> list[Change]:
    """What differs between the configuration of a state (see ``meaning``) and a run's."""
    old, new = _saved_meaning(saved, run), json.loads(meaning(run))
    free = _free(old, new)
    return [
        Change((name,), f"{name}: {before} -> {now}", name in free)
        for name, before, now in _differences(old, new)
    ]


def corpus_change(saved: str | None, own: str, source: Any, names: Sequence[str]) -> list[Change]:
    """The same of the data.

    Args:
        saved: what the state says of them; None where it does not.
        own: what they are now.
        source: says what changed, if it can.
        names: settings that were named; whoever named one of the data's meant other data.
    """
    if saved in (None, own):
        return []
    compare = getattr(source, "changes_since", None)
    details = "".join(f"; {line}" for line in compare(saved)) if compare else ""
    text = (
        f"data: it was run on other data ({saved}; now {own}{details}), so their order is another, and going"
        " on would repeat some and leave out others"
    )
    return [Change(("data", *(name for name in names if _covers("data", name))), text)]


def batch_change(saved: int | None, own: int | None) -> list[Change]:
    """The same of the number of samples that come from one bucket together."""
    if saved in (None, own):
        return []
    text = (
        f"optimizer.batch_size / accumulation: it was run with batches of {saved} samples of one bucket, and"
        f" now they would have {own}, so that others come together"
    )
    return [Change(("optimizer.accumulation", "optimizer.batch_size"), text)]


def refuse(changes: Sequence[Change], run: RunConfig, allow: Sequence[str]) -> None:
    """Refuse changes that would mix two runs, unless they are named.

    Raises:
        UserError: says all of them, and how they are named.
    """
    refused = [change for change in changes if not change.allowed_by(allow)]
    if not refused:
        return
    never = [name for change in refused for name in change.names if name in _NEVER]
    names = ",".join(dict.fromkeys(change.names[0] for change in refused))
    way = (
        f"{' and '.join(never)} cannot change within a run: begin another one with init.from"
        if never
        else f"or, where it is meant, name it: --allow {names}"
    )
    raise UserError(
        f"{run.out} holds a run with another configuration, and going on would mix the two"
        f" ({'; '.join(change.text for change in refused)}); choose another out=, set the values back, or"
        f" delete the folder; {way}"
    )


def check_names(names: Sequence[str], run: RunConfig, changes: Sequence[Change] = ()) -> None:
    """Refuse names of what may change that name nothing, now or in the state.

    Raises:
        UserError: names it, and what is like it.
    """
    known = {name for change in changes for name in change.names}
    known |= set(_settings(run.model_dump(mode="json")))
    for name in names:
        if name not in known:
            alike = get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise UserError(
                f"--allow {name}: there is no such setting; give names as in the configuration, such as"
                f" {alike[0]}, with commas between them"
            )


def _settings(tree: Any, name: str = "") -> Iterator[str]:
    """The names of all settings and groups of them."""
    if name:
        yield name
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _settings(value, f"{name}.{key}".lstrip("."))


def _free(old: Any, new: Any) -> set[str]:
    """Settings that a run may go on with otherwise than it began.

    Where the data lie says nothing of what they are, which is checked by itself. At a constant learning rate
    no step depends on how many are to come, and each has the rate that it is given.
    """
    free = {"data.urls", "data.path"}
    if old["optimizer"]["schedule"] == new["optimizer"]["schedule"] == "constant":
        free |= {"optimizer.steps", "optimizer.learning_rate"}
    return free


def _saved_meaning(saved: str, run: RunConfig) -> Any:
    """A state's configuration, with the defaults of settings that did not exist when it was saved."""
    old = json.loads(saved)
    with suppress(ValidationError):
        return json.loads(meaning(RunConfig.model_validate(old | {"out": run.out})))
    return old


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """What changed between two configurations: name, before, now."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            change
            for key in keys
            for change in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if old == new else [(name, old, new)]
