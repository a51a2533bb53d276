"""Jobs that wait, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .job import Job


@dataclass
class _Waiting:
    job: Job
    passed: int = 0


class Queue:
    """Jobs in the order in which they came.

    One that cannot be drawn beside those that are being drawn is passed over by later ones that can, but only
    ``patience`` times: then nobody is taken until its turn has come. So a stream of requests of one kind
    starves no other.

    Args:
        patience: see above.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._jobs: list[_Waiting] = []

    def __len__(self) -> int:
        """Jobs that wait, without those that were cancelled."""
        return sum(one.job.status == "queued" for one in self._jobs)

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        """A job comes."""
        self._jobs.append(_Waiting(job))

    def jobs(self) -> list[Job]:
        """All that wait, in order."""
        return [one.job for one in self._jobs]

    def take(self, fits: Callable[[Job], bool]) -> Job | None:
        """The first job that fits; None where none does, or another must not wait any longer."""
        self._jobs = [one for one in self._jobs if one.job.status == "queued"]
        for i, one in enumerate(self._jobs):
            if fits(one.job):
                for before in self._jobs[:i]:
                    before.passed += 1
                del self._jobs[i]
                return one.job
            if one.passed >= self._patience:
                return None
        return None
