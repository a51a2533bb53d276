"""``bdm prepare``: which shards are missing, who prepares them, and what came out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from ..config import PrepareConfig
from ..data.prepared import DUPLICATES, FORMAT, MANIFEST
from ..data.source import Source
from ..errors import UserError
from ..files import write_json
from ..formats.weights import DTYPES
from ..models.backbone import load_vae
from ..models.caption_score import CaptionScorer
from ..models.fingerprint import text_fingerprint, tokens_fingerprint, vae_fingerprint
from ..parallel.processes import cpu_only
from ..parallel.ray import run_on_ray
from ..text.native import NativeTextEncoder
from ..training.recipes.build import build_buckets, build_source
from .report import disk_cost, finish_folder
from .shard import Encoders, ShardSettings, prepare_shard
from .writer import read_table

Engine = Literal["accelerate", "ray"]


@dataclass(frozen=True)
class Task:
    """One shard to be prepared: of which part of the data, and which samples."""

    split: str
    indices: range
    path: Path


class Job:
    """A configuration with its data and models, loaded when first used: one for each process that prepares.

    Args:
        config: what is prepared.
        device: of the models.
    """

    def __init__(self, config: PrepareConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        if config.threads:
            torch.set_num_threads(config.threads)
        # As in training, so that the same pictures give the same moments.
        torch.set_flush_denormal(True)
        self.settings = ShardSettings(
            text=config.text,
            dtype=getattr(torch, config.dtype),
            min_score=config.min_score,
            buckets=build_buckets(config.data),
            batch_size=config.batch_size,
            workers=config.workers,
            unreadable_limit=config.unreadable_limit,
        )

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The raw data and its validation part."""
        source = build_source(self.config.data)
        return {"train": source, "validation": source.validation}

    @cached_property
    def encoders(self) -> Encoders:
        """The models on their device."""
        config = self.config
        vae: Any = load_vae(config.vae)
        native = (
            NativeTextEncoder.from_pretrained(config.native_text_encoder)
            if config.native_text_encoder
            else None
        )
        scorer = CaptionScorer(config.scorer, config.scorer_mask) if config.scorer else None
        models: list[Any] = [vae, native, scorer]
        for model in models:
            if model is not None:
                model.to(self.device)
        # As in training.
        vae.to(memory_format=torch.channels_last)
        return Encoders(vae, native, scorer, DTYPES.get(config.mixed_precision))

    def tasks(self) -> list[Task]:
        """All shards of the job: ``samples_per_shard`` neighbours of the raw data each."""
        size, out = self.config.samples_per_shard, self.config.out
        return [
            Task(split, range(start, min(start + size, len(source))), out / f"{split}-{number:05d}.tar")
            for split, source in self.sources.items()
            for number, start in enumerate(range(0, len(source), size))
        ]

    def run(self, task: Task, progress: Any = lambda _: None) -> dict[str, Any]:
        """Prepare one shard."""
        return prepare_shard(
            self.sources[task.split], task.indices, task.path, self.encoders, self.settings, progress
        )

    def manifest(self) -> dict[str, Any]:
        """What decides the shards' content, with the fingerprints of the models."""
        config, encoders = self.config, self.encoders
        models = {"vae": {"source": config.vae, "fingerprint": vae_fingerprint(encoders.vae)}}
        if encoders.native is not None and config.text != "none":
            part, find = {
                "features": ("text_encoder", text_fingerprint),
                "ids": ("tokenizer", tokens_fingerprint),
            }[config.text]
            models[part] = {"source": str(config.native_text_encoder), "fingerprint": find(encoders.native)}
        names = (
            "text",
            "scorer",
            "scorer_mask",
            "min_score",
            "dtype",
            "mixed_precision",
            "samples_per_shard",
        )
        kept = config.model_dump(mode="json", include=set(names))
        kept |= {
            "size": config.data.size,
            "buckets": self.settings.buckets,
            "data": config.data.model_dump(mode="json"),
        }
        return {"format": FORMAT, "models": models, **kept}


class PrepareWorker:
    """Prepares shards in a process of a cluster."""

    def __init__(self, config: PrepareConfig) -> None:
        self.job = Job(config, "cuda" if torch.cuda.is_available() else "cpu")

    def run(self, task: Task) -> int:
        """Prepare one shard; returns its samples."""
        self.job.run(task)
        return len(task.indices)


def prepare(config: PrepareConfig, engine: Engine = "accelerate") -> dict[str, Any]:
    """Prepare what is missing and report on the whole.

    Args:
        config: what is prepared.
        engine: "accelerate" shares the shards out to the processes of ``accelerate launch``; "ray" to the
            workers of a cluster.

    Returns:
        The report, which also lies in ``report.json``; empty in all processes but the first.

    Raises:
        UserError: ``out`` holds shards of another configuration, the disk is full, or too many samples are
            damaged.
    """
    begin = time.perf_counter()
    # Processes that are done wait for the others, and shards differ: the usual ten minutes would end the work
    # of days.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=cpu_only(), kwargs_handlers=[patience]) if engine == "accelerate" else None
    job = Job(config, accelerator.device if accelerator else "cpu")
    first = accelerator is None or accelerator.is_main_process
    if first:
        begin_folder(job)
    if accelerator:
        accelerator.wait_for_everyone()
    tasks = job.tasks()
    missing = [task for task in tasks if read_table(task.path) is None]
    if accelerator:
        accelerator.wait_for_everyone()
        own = missing[accelerator.process_index :: accelerator.num_processes]
        title = (
            f"preparing (process 1 of {accelerator.num_processes})"
            if accelerator.num_processes > 1
            else "preparing"
        )
        with tqdm(
            total=sum(len(task.indices) for task in own),
            desc=title,
            unit="sample",
            mininterval=2,
            disable=not first,
        ) as bar:
            for task in own:
                job.run(task, bar.update)
        accelerator.wait_for_everyone()
    else:
        config = config.model_copy(update={"out": config.out.resolve()})
        tasks_there = [replace(task, path=task.path.resolve()) for task in missing]
        run_on_ray(
            PrepareWorker, (config,), tasks_there, sum(len(task.indices) for task in missing), "preparing"
        )
    if not first:
        return {}
    if absent := [task for task in missing if read_table(task.path) is None]:
        raise UserError(
            f"{len(absent)} of {len(tasks)} shards are missing in {config.out}; run the same command again"
        )
    paths = [task.path for task in tasks]
    samples, new = (sum(len(task.indices) for task in part) for part in (tasks, missing))
    return finish_folder(config.out, paths, samples, new, time.perf_counter() - begin, config.min_score)


def begin_folder(job: Job) -> None:
    """Write the manifest, or see that the one that is there says the same; print the disk cost.

    Raises:
        UserError: it says something else, or the folder cannot be written.
    """
    out = job.config.out
    manifest = json.loads(json.dumps(job.manifest()))
    before = _manifest_of(out)
    if before is not None and (changed := [name for name in manifest if before.get(name) != manifest[name]]):
        seen = "; ".join(f"{name}: {before.get(name)} -> {manifest[name]}" for name in changed)
        raise UserError(
            f"{out} holds shards of another configuration ({seen}); choose another out=, or delete the folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest)
        # The folder is not whole until the duplicates are known again.
        (out / DUPLICATES).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"folder {out} cannot be written ({error.strerror}); choose another with out=FOLDER"
        ) from None
    print(
        disk_cost(
            job.encoders, job.settings, job.config.data.size, sum(len(s) for s in job.sources.values()), out
        )
    )


def _manifest_of(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out / MANIFEST} cannot be read ({error}); choose another out=, or delete the folder"
        ) from None
