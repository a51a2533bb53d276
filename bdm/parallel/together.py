"""What processes decide together, so that all of them go the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError

Result = TypeVar("Result")


class Together:
    """The processes of a run, or one alone; all but the properties is joint work.

    Args:
        accelerator: joins the processes; None for one alone.
    """

    def __init__(self, accelerator: Any = None) -> None:
        several = accelerator is not None and accelerator.num_processes > 1
        self._accelerator = accelerator if several else None

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self._accelerator is not None

    @property
    def first(self) -> bool:
        """Whether this is the first process of all."""
        return self._accelerator is None or self._accelerator.is_main_process

    @property
    def machine(self) -> int:
        """The number of this machine's first process."""
        if self._accelerator is None:
            return 0
        return self._accelerator.process_index - self._accelerator.local_process_index

    @property
    def first_of_machine(self) -> bool:
        """Whether this is the first process of its machine."""
        return self._accelerator is None or self._accelerator.is_local_main_process

    def by_first(self, work: Callable[[], Result]) -> Result:
        """What the first process's work gives, in all of them.

        Raises:
            UserError: in all of them, as in the first.
        """
        if self._accelerator is None:
            return work()
        done: list[Any] = [None, ""]
        if self.first:
            try:
                done[0] = work()
            except UserError as error:
                done[1] = str(error)
        broadcast_object_list(done)
        if done[1]:
            raise UserError(done[1])
        return done[0]

    def all(self, value: Result) -> list[Result]:
        """What each process says."""
        return [value] if self._accelerator is None else gather_object([value])

    def wait(self) -> None:
        """Return when all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
