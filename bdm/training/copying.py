"""Copies of a state's tensors that are made beside training: those of tensors that only a step changes, up to
the end of the next one's backward pass.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line

#: Tensors of fewer bytes are copied at once: they take no time.
LEAST = 256 * 2**10


class Gate:
    """Holds up whoever changes weights, moments or averages, while they are copied."""

    def __init__(self) -> None:
        self._wait: Callable[[], None] = _nothing

    def hold(self, wait: Callable[[], None]) -> None:
        """From now on nobody passes before ``wait`` returns."""
        self._wait = wait

    def passed(self, *_: Any) -> None:
        """Return when they may be changed."""
        self._wait()


def _nothing() -> None:
    pass


class Copies:
    """Makes copies of tensors on the CPU: at once, or, where nothing changes a tensor for now, in ``make``.

    Args:
        room: gives memory for a tensor's copy.
        steady: tensors that stay as they are until ``wait`` returns.
    """

    def __init__(self, room: Callable[[Tensor], Tensor], steady: Iterable[Tensor] = ()) -> None:
        self._room = room
        self._steady = {_place(tensor) for tensor in steady if _may_wait(tensor)}
        self._due: list[tuple[Tensor, Tensor, int]] = []
        self._events: dict[torch.device, Any] = {}
        self._made = threading.Event()
        self._trouble = ""

    def __call__(self, tensor: Tensor) -> Tensor:
        """A tensor's copy, whose values may come later."""
        copy, source = self._room(tensor), tensor.detach()
        # A part of a steady tensor, or one of another shape, is not recognised, and need not be.
        if not _may_wait(source) or _place(source) not in self._steady:
            return copy.copy_(source)
        self._due.append((copy, source, source._version))
        if source.device not in self._events:
            # All that was asked of a GPU so far, the last step among it, comes before the copies.
            stream = torch.cuda.current_stream(source.device) if source.is_cuda else None
            self._events[source.device] = stream and stream.record_event()
        return copy

    def make(self) -> None:
        """Give the copies their values, in whatever thread; what goes wrong is told by ``check``."""
        try:
            for device, event in self._events.items():
                with _beside(device, event):
                    for copy, source, _ in self._due:
                        if source.device == device:
                            _copy(copy, source)
            if any(source._version != version for _, source, version in self._due):
                raise UserError("weights were changed meanwhile; set background_states: false")
        except Exception as error:
            self._trouble = f"its copy in memory failed: {first_line(error)}"
        finally:
            self._due.clear()
            self._made.set()

    def wait(self) -> None:
        """Return when the copies have their values, or never will: the tensors may be changed."""
        self._made.wait()

    def check(self) -> None:
        """Refuse copies that are not what the tensors were.

        Raises:
            UserError: they are not.
        """
        if self._trouble:
            raise UserError(self._trouble)


def _may_wait(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type in ("cpu", "cuda") and tensor.nbytes >= max(1, LEAST)


def _place(tensor: Tensor) -> Any:
    """What two tensors have in common that are the same numbers in the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@contextmanager
def _beside(device: torch.device, event: Any) -> Iterator[None]:
    """A queue of a GPU's own for copies, so that none waits for what training asks of it meanwhile."""
    if event is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _copy(copy: Tensor, source: Tensor) -> None:
    if source.device.type == "cpu" and copy.stride() == source.stride():
        # Equal strides are those of a tensor without gaps. PyTorch would take all cores for it, which the
        # forward pass has.
        ctypes.memmove(copy.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        copy.copy_(source)
