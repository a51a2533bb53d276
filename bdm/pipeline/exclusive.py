"""Objects with a state of one drawing, which two drawings cannot share at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError

_LOCK = threading.Lock()
_TAKEN: set[int] = set()


@contextmanager
def exclusively(scheduler: Any) -> Iterator[None]:
    """Draw with a scheduler that no other pipeline is drawing with, in another thread or around this call.

    It counts the steps of one drawing; a second one would set it back.

    Raises:
        UserError: it is taken; nothing has been drawn then.
    """
    with _LOCK:
        if id(scheduler) in _TAKEN:
            raise UserError(
                "this scheduler is drawing already (in another thread, or around this call);"
                " give the pipeline one of its own: pipe.scheduler = type(s).from_config(s.config)"
            )
        _TAKEN.add(id(scheduler))
    try:
        yield
    finally:
        _TAKEN.discard(id(scheduler))
