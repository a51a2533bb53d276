"""From one step's figures to what a run needs on given machines: memory, time, cost and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..config import FolderConfig, PreparedConfig, RunConfig
from ..data.prepared import read_manifest
from ..data.source import Source
from ..errors import UserError
from ..training.recipes.build import build_source
from .fake_step import STATE_BYTES, StepFigures, step_figures
from .sizes import CUDA_CONTEXT, GIB, NCCL

#: Kinds whose captions or pictures are needed in every step, so that no cache can stand for them.
_NEVER_CACHED = ("embedding", "controlnet")


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        gpus: processes, each with a GPU.
        memory: GiB of a GPU.
        tflops: a GPU's dense rate at the precision in use, in 10^12 operations a second (312: an A100 or A800
            in bf16).
        utilisation: share of it that training reaches.
        price: of a GPU for an hour.
    """

    gpus: int = 1
    memory: float = 80.0
    tflops: float = 312.0
    utilisation: float = 0.4
    price: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and (value > 0 or (name == "price" and value == 0))):
                raise UserError(f"{name.replace('_', ' ')} {value:g} must be a positive number")
        if self.utilisation > 1:
            raise UserError(
                f"utilisation {self.utilisation:g} is a share; give one between 0 and 1, such as 0.4"
            )


@dataclass(frozen=True)
class Fit:
    """A way to share the batch that a GPU holds.

    Samples of a micro-batch, accumulation, and the bytes it takes.
    """

    micro_batch: int
    accumulation: int
    memory: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs.

    Attributes:
        step: the figures of a step.
        machine: what it is planned for.
        accumulation: micro-batches of a step.
        memory: bytes of a GPU by what they are for; "peak of a step" in parts, then what comes beside it.
        fit: another way to share the batch where this one does not fit; None where it does, or where nothing
            would.
        samples: of the corpus.
        captions: different captions, as far as they are kept in memory.
        flops: operations for a sample as configured; None where they cannot be counted.
        flops_from_caches: with cached moments and features; None where nothing can be cached.
        run_samples: drawn in the whole run.
        disk: bytes of the whole corpus's caches, and of one saved state, by name.
    """

    step: StepFigures
    machine: Machine
    accumulation: int
    memory: dict[str, float]
    fit: Fit | None
    samples: int
    captions: int
    flops: float | None
    flops_from_caches: float | None
    run_samples: int
    disk: dict[str, int]

    @property
    def total_memory(self) -> float:
        """Bytes that a GPU must hold."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a GPU holds them."""
        return self.total_memory <= self.machine.memory * GIB

    def samples_per_second(self, flops: float) -> float:
        """Of all GPUs together, at ``flops`` operations for a sample."""
        return self.machine.gpus * self.machine.tflops * 1e12 * self.machine.utilisation / flops

    def days(self, samples: int, flops: float) -> float:
        """Time for so many samples."""
        return samples / self.samples_per_second(flops) / 86400

    def cost(self, days: float) -> float:
        """Of all GPUs for so long."""
        return days * 24 * self.machine.gpus * self.machine.price


def make_plan(run: RunConfig, machine: Machine, samples: int | None = None) -> Plan:
    """Work out what a run needs.

    Args:
        run: the configuration.
        machine: what it is to run on.
        samples: of the corpus; counted in the data if None.

    Raises:
        UserError: the batch cannot be shared, the data cannot be counted, or a model is unknown.
    """
    config = run.optimizer
    micro, rest = divmod(config.batch_size, machine.gpus * config.accumulation)
    if rest or not micro:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {machine.gpus} GPUs x {config.accumulation}"
            " accumulation steps; make it divisible with optimizer.batch_size=, optimizer.accumulation= or"
            " --gpus"
        )
    count, captions = _corpus(run, samples)
    step = step_figures(run, micro, machine.gpus)
    memory = _memory(run, step, machine, captions)
    fit = None if sum(memory.values()) <= machine.memory * GIB else _find_fit(run, machine, step, captions)
    flops, flops_from_caches = _operations(run, step)
    return Plan(
        step=step,
        machine=machine,
        accumulation=config.accumulation,
        memory=memory,
        fit=fit,
        samples=count,
        captions=captions,
        flops=flops,
        flops_from_caches=flops_from_caches,
        run_samples=config.steps * config.batch_size,
        disk=_disk(step, count, STATE_BYTES[config.name]),
    )


def _operations(run: RunConfig, step: StepFigures) -> tuple[float | None, float | None]:
    """For a sample, as configured and from caches; None where they are not known or there are no caches."""
    if step.uncounted:
        return None, None
    online = sum(step.forward.values()) + step.backward
    if not step.encoding or run.recipe.kind in _NEVER_CACHED:
        return online, None
    return online, online if getattr(run.recipe, "cache", False) else online - step.encoding


def sample_operations(run: RunConfig) -> float:
    """Operations of training on a sample, forward and backward, as the run reads its data.

    Raises:
        UserError: they cannot be counted with this PyTorch.
    """
    data = run.data
    if isinstance(data, PreparedConfig):
        # As the pictures that were prepared.
        size = read_manifest(data.path.rstrip("/"))["size"]
        pictures = FolderConfig(kind="folder", path=Path(data.path), size=size)
        run = run.model_copy(update={"data": pictures})
    step = step_figures(run, 1, validate=False)
    flops, from_caches = _operations(run, step)
    if isinstance(data, PreparedConfig) and from_caches is not None:
        flops = from_caches
    if flops is None:
        raise UserError(
            f"peak_tflops: the operations of {', '.join(step.uncounted)} cannot be counted with this PyTorch;"
            " leave it out"
        )
    return flops


def _corpus(run: RunConfig, samples: int | None) -> tuple[int, int]:
    """Samples of the corpus, and how many different captions a cache would keep in memory."""
    cached = bool(getattr(run.recipe, "cache", False))
    if samples is not None:
        if samples < 1:
            raise UserError(f"--samples {samples} must be at least 1")
        return samples, samples if cached else 0
    try:
        source: Source = build_source(run.data)
    except UserError as error:
        raise UserError(
            f"the corpus cannot be counted here ({error}); give its size with --samples"
        ) from None
    return len(source), len({source.caption(i) for i in range(len(source))} | {""}) if cached else 0


def _memory(run: RunConfig, step: StepFigures, machine: Machine, captions: int) -> dict[str, float]:
    memory: dict[str, float] = dict(step.at_peak)
    if step.validation_peak > step.peak:
        # Validation takes batches of its own size.
        memory["validation beyond a step"] = step.validation_peak - step.peak
    if captions and run.recipe.kind not in _NEVER_CACHED:
        memory["features of all captions"] = 4.0 * captions * math.prod(step.features)
    memory["workspace (estimate)"] = float(step.largest_convolution)
    memory["CUDA context (assumed)"] = CUDA_CONTEXT + (NCCL if machine.gpus > 1 else 0.0)
    return memory


def _find_fit(run: RunConfig, machine: Machine, given: StepFigures, captions: int) -> Fit | None:
    """The largest micro-batch that fits, by bisection: memory never shrinks with it."""
    of_gpu = run.optimizer.batch_size // machine.gpus
    smaller = [micro for micro in range(1, given.batch) if of_gpu % micro == 0]
    fit, low, high = None, 0, len(smaller)
    while low < high:
        middle = (low + high) // 2
        micro = smaller[middle]
        optimizer = run.optimizer.model_copy(update={"accumulation": of_gpu // micro})
        changed = run.model_copy(update={"optimizer": optimizer})
        memory = sum(_memory(changed, step_figures(changed, micro, machine.gpus), machine, captions).values())
        if memory <= machine.memory * GIB:
            fit, low = Fit(micro, of_gpu // micro, memory), middle + 1
        else:
            high = middle
    return fit


def _disk(step: StepFigures, samples: int, state_bytes: int) -> dict[str, int]:
    disk = {}
    if step.moments:
        disk["VAE moments (fp16)"] = 2 * math.prod(step.moments) * samples
        disk["text features (fp16)"] = 2 * math.prod(step.features) * samples
        disk["token ids (int32), instead"] = 4 * step.features[0] * samples
    # A state holds the weights and their average in float32, and the optimizer's states.
    disk["one saved state"] = (4 + 4 + state_bytes) * step.trained_parameters
    return disk
