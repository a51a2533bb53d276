"""Imports that take seconds, without the garbage collector's looking through what they make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_own_process = False


def own_process() -> None:
    """This process is the command's alone, so its collector may be told what to leave."""
    global _own_process
    _own_process = True


@contextmanager
def importing() -> Iterator[None]:
    """The block imports: nothing is collected in it, and what it made is never looked at again.

    Modules stay to the end, and those of PyTorch and its like are a million objects. Looking for garbage
    among them, while they are imported and when Python ends, takes a third of what a small picture takes.
    Without effect where the process is somebody else's.
    """
    if not _own_process:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave() -> None:
    """The command is done: what it leaves behind goes with its process."""
    if _own_process:
        gc.freeze()
