"""Requests -> pictures, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .complete import complete
from .jobs import Counts, Failure, Job, Todo, draw_each, parts
from .library import Library
from .painter import NONE_DRAWN, Drawn, Painter, choose_device, usual_precision
from .picture_names import apart, check_pattern, picture_name
from .request import Request


@dataclass(frozen=True)
class Pictures(Sequence[Any]):
    """What became of requests.

    Attributes:
        drawn: a picture for each request, in their order; None for one that failed, and for all where a
            folder was given.
        failed: what failed, and why.
        counts: how many were drawn, drawn in place of others, kept and failed.
        paths: of the files; empty where no folder was given.
    """

    drawn: tuple[Drawn | None, ...]
    failed: tuple[Failure, ...]
    counts: Counts
    paths: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.drawn)

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: Any) -> Any:
        return self.drawn[index]


def draw(
    requests: Request | Iterable[Request],
    out: str | Path | None = None,
    *,
    models: Sequence[str | Path] = (),
    names: str = "[number]",
    batch: int = 1,
    device: str | None = None,
    again: bool = False,
) -> Pictures:
    """Draw pictures, as ``bdm infer`` does.

    One that cannot be drawn ends none of the others.

    Args:
        requests: one or many.
        out: folder of their files, in which one that is there already, by its own JSON, is kept. Without it
            the pictures are given; ``save`` writes one with how it was made.
        models: folders that files are looked for in.
        names: pattern of the files' names (see ``bdm.drawing.picture_names``).
        batch: pictures that are drawn at once; the last bits of a picture hang on it.
        device: by name; None for the best there is.
        again: draw what is there too.

    Returns:
        The pictures or their files, what failed, and how many of each.

    Raises:
        UserError: a pattern or device that cannot be.
    """
    check_pattern(names)
    given = [requests] if isinstance(requests, Request) else list(requests)
    library, precision = Library(models), usual_precision(choose_device(device))
    failed: list[Failure] = []
    found: list[tuple[int, Request]] = []
    for i, request in enumerate(given):
        try:
            found.append((i, complete(request, library, precision)))
        except UserError as error:
            failed.append(Failure(f"request {i + 1}", f"cannot be drawn: {error}"))
    folder = Path() if out is None else Path(out)
    files = apart(picture_name(names, request, i) for i, request in found)
    jobs = [Job(folder / name, request, f"request {i + 1}") for name, (i, request) in zip(files, found)]
    painter = Painter(device)
    if out is not None:
        return _into_files(painter, jobs, failed, batch, again, len(given))
    return _in_memory(painter, jobs, failed, batch, [i for i, _ in found], len(given))


def _into_files(
    painter: Painter, jobs: list[Job], failed: list[Failure], batch: int, again: bool, count: int
) -> Pictures:
    todo = Todo.of(jobs, again)
    for part in parts(todo.waiting, batch):
        painter.run(part)
    failed += painter.take_failures()
    return Pictures((None,) * count, tuple(failed), todo.counts(failed), tuple(job.path for job in jobs))


def _in_memory(
    painter: Painter, jobs: list[Job], failed: list[Failure], batch: int, places: list[int], count: int
) -> Pictures:
    done: dict[Path, Drawn] = {}

    def keep(part: list[Job]) -> None:
        for job, picture in zip(part, painter.draw([job.request for job in part]), strict=True):
            if picture is None:
                raise UserError(NONE_DRAWN.format("the picture"))
            done[job.path] = picture

    for part in parts(jobs, batch):
        failed += draw_each(keep, part, lambda job: job.path in done)
    drawn: list[Drawn | None] = [None] * count
    for i, job in zip(places, jobs, strict=True):
        drawn[i] = done.get(job.path)
    return Pictures(tuple(drawn), tuple(failed), Counts(len(done), 0, 0, len(failed)))
