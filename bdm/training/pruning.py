"""Which states stay."""

from __future__ import annotations

import logging

from ..errors import UserError, first_line
from .places import INDEX, Place, step_of

logger = logging.getLogger("bdm")


def prune(place: Place, new: str, keep_last: int, keep_every: int, best: int | None) -> None:
    """Delete the states that are not kept, and what was begun and never finished.

    Args:
        place: of the states.
        new: the one that was just written, which stays.
        keep_last: see ``bdm.training.states.save_state``.
        keep_every: the same.
        best: the same.
    """
    try:
        entries = place.entries()
        twice = {entry for entry in entries if step_of(entry) == step_of(new)} - {new}
        for entry in [*entries[keep_last:], *twice]:
            stays = step_of(entry) == best or (keep_every and step_of(entry) % keep_every == 0)
            if entry in twice or (entry != new and not stays):
                place.drop(entry)
        _sweep(place, new)
    except (OSError, UserError) as error:
        logger.warning("old states stay where they are: %s", first_line(error))


def _sweep(place: Place, new: str) -> None:
    """Delete files that belong to no state, up to the one that was just written."""
    names, whole = place.names(), set(place.entries())
    indexed = f"{new}/{INDEX}" in names
    own = [f"{new}/{name}" for name in (*place.index(new)["files"], INDEX)] if indexed else []
    for name in names:
        entry, inside, _ = name.partition("/")
        begun = entry not in whole and not _set_aside(entry, names)
        left = begun and 0 <= step_of(entry) <= step_of(new)
        if inside and (left or (entry == new and name not in own)):
            place.remove(name)


def _set_aside(entry: str, names: list[str]) -> bool:
    return f"{entry}/{INDEX}.damaged" in names
