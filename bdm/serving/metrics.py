"""Figures of a server in Prometheus' words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counts what a server does; each server has its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        named: Any = {"registry": self._registry}
        self.answers = Counter("bdm_http_answers", "Answers by status", ["code"], **named)
        self.accepted = Counter("bdm_pictures_accepted", "Pictures that were accepted", ["way"], **named)
        self._ended = Counter(
            "bdm_pictures_ended", "Pictures by what became of them", ["way", "end"], **named
        )
        self._seconds = Histogram(
            "bdm_picture_seconds", "From being accepted to being kept", buckets=_SECONDS, **named
        )
        self._usual = 1.0

    def ended(self, way: str, end: str, seconds: float) -> None:
        """A picture was kept, or will not be."""
        self._ended.labels(way, end).inc()
        if end == "done":
            self._seconds.observe(seconds)
            self._usual += 0.1 * (min(seconds, 600) - self._usual)

    def usual_seconds(self) -> float:
        """About how long a picture takes of late, between its neighbours."""
        return self._usual / 4

    def watch(self, desk: Any) -> None:
        """Tell what waits at a desk and what its engine says of itself."""
        self._registry.register(_Watched(desk))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Watched:
    """Figures that are looked up when somebody asks."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def collect(self) -> Iterator[Metric]:
        states = [ticket.status for ticket in self._desk.live]
        waiting = GaugeMetricFamily("bdm_pictures", "Pictures that are not drawn yet", labels=["state"])
        for state in ("queued", "running"):
            waiting.add_metric([state], states.count(state))
        yield waiting
        for name, value in sorted(self._desk.engine.stats().items()):
            yield GaugeMetricFamily(f"bdm_engine_{name}", f"Of the engine: {name}", value=float(value))
