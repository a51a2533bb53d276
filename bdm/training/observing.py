"""Those who look on while a run trains: one way for all of them to see its steps, and to say what they saw.

They change nothing of a step. Each adds figures to the rows of ``metrics.jsonl``; the loop knows none of
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Observer:
    """Sees a run's steps. Subclasses take what they need of it."""

    def before(self, step: int) -> None:
        """A step begins; counted from 0."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the work: "data", "forward", "backward", "weights", "evaluation" or "state"."""
        yield

    def gradients(self, norm: Tensor, due: bool) -> None:
        """The gradients of a step are there, scaled down from ``norm``; ``due``: its row will be written."""

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        """What is added to the row of so many steps, which took so long; joint work of all processes."""
        return {}

    def close(self) -> None:
        """There are no more steps."""


class Observers(Observer):
    """Several in one.

    Args:
        observers: they see everything in this order.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = list(observers)

    def before(self, step: int) -> None:
        for one in self._all:
            one.before(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self._all:
                stack.enter_context(one.phase(name))
            yield

    def gradients(self, norm: Tensor, due: bool) -> None:
        for one in self._all:
            one.gradients(norm, due)

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        return {name: value for one in self._all for name, value in one.figures(steps, seconds).items()}

    def close(self) -> None:
        for one in self._all:
            one.close()


class PhaseClock(Observer):
    """Seconds of each phase, and which process is the slowest and the fastest.

    On a GPU they are those of the device: its events are read when a row is due, so that it is waited for no
    oftener than without. A process's own pace is told by the phases before the gradients are joined; behind
    that all wait for the slowest.

    Args:
        accelerator: joins the processes.
    """

    #: Phases in which no process waits for another.
    OWN = ("data", "forward")

    def __init__(self, accelerator: Any) -> None:
        self._accelerator, self._on_gpu = accelerator, accelerator.device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self._seconds(start, end)
        self._spans = []
        # Evaluations that are not due take microseconds.
        row = {f"seconds/{name}": value for name, value in sums.items() if value > seconds / 10_000}
        return row | self._paces(sum(sums.get(name, 0.0) for name in self.OWN) / max(1, steps))

    def _paces(self, own: float) -> dict[str, float]:
        """Seconds a step of the slowest and the fastest process, and which they are."""
        if self._accelerator.num_processes == 1:
            return {}
        paces = self._accelerator.gather(torch.tensor([own], device=self._accelerator.device))
        slowest, fastest = int(paces.argmax()), int(paces.argmin())
        return {
            "pace/slowest": paces[slowest].item(),
            "pace/slowest_process": slowest,
            "pace/fastest": paces[fastest].item(),
            "pace/fastest_process": fastest,
        }


class GradientNorms(Observer):
    """The norm of the gradients by part of what is trained, in the last step of a row.

    Args:
        parts: what is trained, by name; parts of it have their own figures.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._groups: dict[str, list[nn.Parameter]] = {}
        for name, part in parts.items():
            for inner, parameter in part.named_parameters():
                child, _, rest = inner.partition(".")
                self._groups.setdefault(f"{name}.{child}" if rest else name, []).append(parameter)
        self._norms: tuple[Tensor, Tensor] | None = None

    def gradients(self, norm: Tensor, due: bool) -> None:
        self._norms = None
        if due:
            # Before the optimizer's step forgets them.
            own = [_norm(parameters) for parameters in self._groups.values()]
            self._norms = torch.stack(own), norm

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        if self._norms is None:
            return {}
        scaled, norm = self._norms[0].double(), float(self._norms[1])
        # They were scaled down together, and perhaps up before, so that only their shares are left.
        shares = (scaled / scaled.square().sum().sqrt()).tolist()
        found = {f"grad_norm/{name}": share * norm for name, share in zip(self._groups, shares, strict=True)}
        return {name: value for name, value in found.items() if value == value and value < float("inf")}


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the gradients of some parameters; zero without any (an engine may keep them elsewhere)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class DeviceMemory(Observer):
    """Most memory of a GPU that was in use in a row's steps, in the process where it was most, in GiB.

    Args:
        accelerator: joins the processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        device = self._accelerator.device
        if device.type != "cuda":
            return {}
        used = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
        torch.cuda.reset_peak_memory_stats(device)
        everywhere = self._accelerator.gather(torch.tensor([used], dtype=torch.float64, device=device))
        allocated, reserved = (everywhere.max(0).values / 2**30).tolist()
        return {"memory/allocated": allocated, "memory/reserved": reserved}


class Utilisation(Observer):
    """Model FLOP utilisation: the operations of the model's steps, over those that the machines could do.

    What is worked out again to save memory counts as it is counted in ``operations``.

    Args:
        operations: of a sample, forward and backward.
        batch: samples of a step, over all processes.
        peak: operations a second of all processes' devices together.
    """

    def __init__(self, operations: float, batch: int, peak: float) -> None:
        self._share = operations * batch / peak

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        return {"flop_utilisation": self._share * steps / seconds}


def measured_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of a device, by products of large matrices; a multiplication and an addition are
    two.
    """
    side = 4096 if device.type == "cuda" else 768
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run(2)
    one = max(run(2) / 2, 1e-6)
    count = max(2, round(seconds / one))
    return 2 * side**3 * count / run(count)
