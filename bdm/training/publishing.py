"""The end of a run: its averaged weights as a finished model, with a card that says how they came about."""

from __future__ import annotations

from typing import Any

import torch

from ..config import RunConfig
from ..files import atomic_write, write_json
from .metrics import read_metrics
from .resuming import Progress
from .setup import TrainState


def publish(run: RunConfig, state: TrainState, command: str, progress: Progress) -> None:
    """Save the averaged weights of a run that is so far as ``out/model``; all processes take part."""
    state.recipe.eval()
    state.accelerator.wait_for_everyone()
    with state.ema.applied():
        state.recipe.finish()
        with state.strategy.whole_weights(state.parts):
            if state.accelerator.is_main_process:
                with atomic_write(run.out / "model") as folder:
                    state.recipe.save(folder)
                    card = _card(run, command, progress) | _size(state, progress) | state.recipe.facts()
                    write_json(folder / "card.json", card)
    state.accelerator.wait_for_everyone()


def _size(state: TrainState, progress: Progress) -> dict[str, int]:
    """How much was trained, and on how many samples."""
    parameters = sum(weight.numel() for part in state.parts.values() for weight in part.parameters())
    return {"samples": progress.samples, "trained_parameters": parameters}


def _card(run: RunConfig, command: str, progress: Progress) -> dict[str, Any]:
    rows = read_metrics(run.out)
    losses = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "seconds" not in row]
    validation = {k: v for k, v in validations[-1].items() if k != "step"} if validations else {}
    return {
        "command": command,
        "seed": run.seed,
        "steps": progress.step,
        "seconds": round(sum(row["seconds"] for row in losses)),
        "threads": torch.get_num_threads(),
        "final_loss": losses[-1]["loss"] if losses else None,
        "validation": validation,
        "torch": torch.__version__,
        **({"history": [dict(entry) for entry in progress.history]} if progress.history else {}),
    }
