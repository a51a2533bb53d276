"""A running batch: courses that stop at the same networks, whose calls are made together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..drawing.request import Request
from ..speed.folding import FoldedEnlargements, fold_layers
from ..speed.joined import JoinedBranch, JoinedControlNet, JoinedNetwork, JoinedUNet
from ..speed.sharing import KeptProjections
from .adapters import BatchAdapters
from .controls import BatchControls
from .course import Course


class Batch:
    """Courses through one UNet, and the branch and ControlNets beside it.

    Rounds go to whoever has waited longest. The calls of ControlNets and branch come before the backbone's,
    so that drawings at different places of a step meet.

    Args:
        pipe: whose networks they are; nobody else may draw with it until ``close``.
        bound: gives how many drawings a call may join, by height and width of their latents.
        request: whose plug-ins are on the pipeline; None for none.

    Attributes:
        request: the same.
        adapters: of drawings with other strengths than that request's.
        controls: that request's ControlNets.
        courses: that are on their way.
        last: steps of drawings in the last round; 0 where it was no call of the backbone.
    """

    def __init__(self, pipe: Any, bound: Callable[[int, int], int], request: Request | None = None) -> None:
        self.pipe, self.request = pipe, request or Request()
        self._bound, self._bounds = bound, dict[tuple[int, int], int]()
        self.courses: list[Course] = []
        self.last = 0
        self._rounds = 0
        self._stack = ExitStack()
        self.controls = BatchControls(pipe, self.request)
        controlnets, branches = self.controls.networks, [] if pipe.branch is None else [pipe.branch]
        self._order = [*controlnets, *branches, pipe.unet]
        unet = JoinedUNet(pipe.unet)
        self._joined: list[JoinedNetwork] = [
            *map(JoinedControlNet, controlnets), *map(JoinedBranch, branches), unet,
        ]  # fmt: skip
        self.adapters = BatchAdapters(pipe, self.request, self._stack, unet.distinct)
        try:
            self._hang()
        except BaseException:
            self._stack.close()
            raise

    def _hang(self) -> None:
        for joined in self._joined:
            joined.hang(self._stack)
        if self.pipe.branch is not None:
            KeptProjections().hang(self._stack, self.pipe.unet, self.pipe.branch)
        FoldedEnlargements().hang(self._stack, self.pipe.unet, self.pipe.branch)
        fold_layers(self._stack, self.pipe.vae)

    def close(self) -> None:
        """The networks are as they were."""
        self._stack.close()

    def enter(self, course: Course) -> None:
        """Let a course begin, up to its first call."""
        self.courses.append(course)
        self._go(course)

    def stop(self, course: Course, error: BaseException) -> None:
        """End a course where it is."""
        course.go(error)
        while not course.ended:  # it may draw on in spite of it
            course.go(error)
        self._leave(course)

    def round(self) -> list[Course]:
        """Make one joined call; gives the courses that have ended by it."""
        self._rounds, self.last = self._rounds + 1, 0
        group = self._next()
        answers = self._answers(group)
        for course, answer in zip(group, answers, strict=True):
            self._go(course, answer)
        return [course for course in group if course.ended]

    def _go(self, course: Course, answer: Any = None) -> None:
        course.go(answer)
        course.since = self._rounds
        if course.ended:
            self._leave(course)

    def _leave(self, course: Course) -> None:
        self.courses.remove(course)

    def _next(self) -> list[Course]:
        """The courses whose calls are made now."""
        first = min(self._place(course) for course in self.courses)
        there = [course for course in self.courses if self._place(course) == first]
        oldest = min(there, key=lambda course: course.since)
        key = self._key(oldest)
        if key is None:
            return [oldest]
        group = sorted((course for course in there if self._key(course) == key), key=lambda one: one.since)
        chosen = group[: self._most(oldest)] if len(group) > 1 else group
        return [course for course in self.courses if course in chosen]  # in one order, so that texts stay

    def _most(self, course: Course) -> int:
        """How many drawings of a course's size a call may join."""
        height, width = course.values["sample"].shape[-2:]
        if (height, width) not in self._bounds:
            self._bounds[height, width] = self._bound(height, width)
        return self._bounds[height, width]

    def _place(self, course: Course) -> int:
        return next(i for i, network in enumerate(self._order) if network is course.network)

    def _key(self, course: Course) -> Hashable | None:
        return self._joined[self._place(course)].key(course.values)

    @torch.no_grad()
    def _answers(self, group: Sequence[Course]) -> list[Any]:
        """What the calls of a group gave; where they fail together, each alone."""
        joined = self._joined[self._place(group[0])]
        self.last = len(group) if group[0].network is self.pipe.unet else 0
        for course in group:
            course.together = max(course.together, len(group))
        if joined.key(group[0].values) is None:
            return [_try(lambda: self._called(group, lambda calls: group[0].network(**calls[0])))]
        found = _try(lambda: self._called(group, joined))
        if not isinstance(found, Exception):
            return found
        each = [_try(lambda course=course: self._called([course], joined)) for course in group]
        return [one if isinstance(one, Exception) else one[0] for one in each]

    def _called(self, group: Sequence[Course], network: Callable[[Any], Any]) -> Any:
        """What a network gives for the calls of a group, with the adapters of each."""
        each = [(course.differences, len(course.values["sample"])) for course in group]
        with self.adapters.joined(each):
            return network([course.values for course in group])


def _try(call: Any) -> Any:
    """What a call gave, or the exception that ended it."""
    try:
        return call()
    except Exception as error:  # of a library, for any reason
        return error
