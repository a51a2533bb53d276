"""A drawing that stops wherever it calls a network, until somebody has the result.

Each has a thread, of which one acts at a time: a course goes on where the engine lets it and gives the turn
back when it calls or ends. So nothing that drawings share needs a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any


class Course:
    """A drawing on its way.

    Args:
        draw: draws, in a thread of the course's own; is given ``ask``.
        differences: of its adapters (see ``bdm.serving.adapters``).

    Attributes:
        differences: the same.
        network: whom it calls now; None where it has ended.
        values: the arguments of that call, by name.
        since: number of the round in which it called.
        together: drawings that shared a call with it at most, itself among them.
        result: what ``draw`` gave, once it has ended.
        error: what ended it instead.
    """

    def __init__(
        self, draw: Callable[[Course], Any], differences: Mapping[Any, tuple[float, float]] | None = None
    ) -> None:
        self.differences = differences or {}
        self.network: Any = None
        self.values: Mapping[str, Any] = {}
        self.since, self.together = 0, 1
        self.result: Any = None
        self.error: BaseException | None = None
        self._answer: Any = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(draw,), name="bdm-course", daemon=True)
        self._started = False

    @property
    def ended(self) -> bool:
        """Whether it has drawn, or failed."""
        return self._started and self.network is None

    def go(self, answer: Any = None) -> None:
        """Let it go on to its next call, or its end.

        Args:
            answer: what its call gave; an exception is raised where it called.
        """
        self._answer, self.network = answer, None
        if not self._started:
            self._started = True
            self._thread.start()
        else:
            self._turn.release()
        self._back.acquire()

    def ask(self, network: Any, values: Mapping[str, Any]) -> Any:
        """Call a network; in the course's own thread.

        Args:
            network: whom.
            values: arguments by name.

        Returns:
            What it gave, some time later.
        """
        self.network, self.values = network, values
        self._back.release()
        self._turn.acquire()
        answer, self._answer, self.values = self._answer, None, {}
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _run(self, draw: Callable[[Course], Any]) -> None:
        try:
            self.result = draw(self)
        except BaseException as error:  # whatever it is, it ends this course alone
            self.error = error
        self._back.release()
