"""Benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .reading import PositiveInt, Strict


class BenchConfig(Strict):
    """What all comparisons with a peer share (see ``bdm.bench``).

    Results that differ by more than ``tolerance`` are not timed.
    """

    out: Path
    pairs: PositiveInt = 5
    warm_up: Annotated[int, Field(ge=0)] = 1
    threads: PositiveInt | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tolerance: Annotated[float, Field(gt=0)] = 3e-5
    seed: int = 0


class BenchModelConfig(BenchConfig):
    """Random weights of SD1.5's size (``unet`` and ``vae`` hold what differs), or a pipeline folder's."""

    model: Path | None = None
    unet: dict[str, Any] = Field({})
    vae: dict[str, Any] = Field({})
    native_width: PositiveInt = 1024
    latents: PositiveInt = 64
    batch: PositiveInt = 1


class BenchDrawConfig(BenchModelConfig):
    """What is drawn beside diffusers' UNet and ControlNet on the doubled batch."""

    peers: tuple[Literal["diffusers", "diffusers compiled", "bdm unprepared", "bdm plain"], ...] = (
        "diffusers",
        "bdm unprepared",
        "bdm plain",
    )
    steps: PositiveInt = 1
    guidance: Annotated[float, Field(gt=1)] = 7.5
    decode: bool = False


class BenchInferConfig(BenchDrawConfig):
    """Guided drawing, beside a peer (see ``bdm.bench.infer``)."""

    kind: Literal["infer"]


class BenchScaleConfig(BenchDrawConfig):
    """The same with several numbers of pictures at once (see ``bdm.bench.scale``); ``batch`` is not used."""

    kind: Literal["scale"]
    batches: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64)


class BenchDecodeConfig(BenchModelConfig):
    """Latents to pictures, beside diffusers (see ``bdm.bench.decode``)."""

    kind: Literal["decode"]


class BenchTrainConfig(BenchModelConfig):
    """A training step from cached moments and text, beside diffusers' ControlNet recipe (see
    ``bdm.bench.train``).
    """

    kind: Literal["train"]
    peers: tuple[Literal["recipe", "recipe with caches"], ...] = ("recipe", "recipe with caches")
    text: dict[str, Any] = Field({})
    native_text: dict[str, Any] = Field({})


class BenchLoadConfig(BenchConfig):
    """Reading a single file of SD1.5's size, beside diffusers (see ``bdm.bench.load``)."""

    kind: Literal["load"]
    unet: dict[str, Any] = Field({})
    vae: dict[str, Any] = Field({})
    text: dict[str, Any] = Field({})


class BenchDataConfig(BenchConfig):
    """What a large corpus costs a process before and between its steps (see ``bdm.bench.data``).

    ``samples`` are the sizes of indices without pictures; ``shards`` of ``rows`` pictures each are read from
    a store of ``latency`` seconds a request.
    """

    kind: Literal["data"]
    pairs: PositiveInt = 2
    samples: tuple[PositiveInt, ...] = (10**6, 10**7, 10**8)
    per_shard: PositiveInt = 10_000
    batch: PositiveInt = 3200
    processes: PositiveInt = 8
    partitions: PositiveInt = 64
    shards: Annotated[int, Field(ge=8)] = 32
    rows: PositiveInt = 48
    latency: Annotated[float, Field(ge=0)] = 0.02


class BenchStatesConfig(BenchConfig):
    """How long training waits for a state of so many ``megabytes`` (see ``bdm.bench.states``), which is
    written in ``folder``; the system's own for such files without. Forward and backward passes of a step take
    ``step_seconds``.
    """

    kind: Literal["states"]
    megabytes: PositiveInt = 1600
    step_seconds: Annotated[float, Field(ge=0)] = 0.5
    folder: Path | None = None


class BenchServeConfig(BenchConfig):
    """Requests at once to an engine that joins their steps, beside one that does not (see
    ``bdm.bench.serve``).

    ``max_batch`` bounds how many are drawn at once; without it all of them are.
    """

    kind: Literal["serve"]
    model: Path | None = None
    requests: PositiveInt = 16
    steps: PositiveInt = 30
    pairs: PositiveInt = 3
    max_batch: PositiveInt | None = None


class BenchGpuConfig(Strict):
    """The tests marked ``gpu`` and some benches, within ``seconds`` (see ``bdm.bench.gpu``).

    ``benches`` are configurations of benches without ``out`` and ``device``. On device cpu it is a rehearsal,
    with the same tests on the CPU.
    """

    kind: Literal["gpu"]
    out: Path
    device: Literal["cpu", "cuda"] = "cuda"
    seconds: Annotated[float, Field(gt=0)] = 450.0
    tests: tuple[str, ...] | None = ("tests",)
    benches: dict[str, dict[str, Any]] = Field({})

    @model_validator(mode="after")
    def _known(self) -> BenchGpuConfig:
        for name, settings in self.benches.items():
            kind = settings.get("kind")
            if kind not in BENCHES or name in ("device", "torch", "tests", "total_seconds"):
                raise ValueError(f"benches.{name}: kind is {kind!r}; allowed are {', '.join(BENCHES)}")
            BENCHES[kind].model_validate({**settings, "out": self.out, "device": self.device})
        return self


#: The configuration of each ``bdm bench`` command but ``gpu``.
BENCHES: dict[str, type[BenchConfig]] = {
    "infer": BenchInferConfig,
    "scale": BenchScaleConfig,
    "decode": BenchDecodeConfig,
    "train": BenchTrainConfig,
    "load": BenchLoadConfig,
    "data": BenchDataConfig,
    "states": BenchStatesConfig,
    "serve": BenchServeConfig,
}
