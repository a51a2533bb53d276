"""What is known of a route without drawing: its training, how far its UNet moved, how it cuts captions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..formats.weights import read_json
from ..models.distance import weight_distance
from ..training.recipes.text_slot import cross_attention
from ..training.states import read_state, state_files
from .route import Route


def training_facts(route: Route) -> dict[str, Any]:
    """What the model's card says of its training; nothing of a model that was not trained for the route.

    A branch's card lies in its own folder.
    """
    if route.slot == "translation":
        return {"trained_parameters": 0, "samples": 0, "pretraining": route.beginning}
    place = next(
        (p for p in (route.model / "branch" / "card.json", route.model / "card.json") if p.is_file()), None
    )
    card = read_json(place) if place else {}
    facts = {key: card.get(key) for key in ("trained_parameters", "samples")}
    if facts["trained_parameters"] is None and route.slot == "branch":
        facts["trained_parameters"] = sum(p.numel() for p in route.pipe.branch.parameters())
    steps, seconds = card.get("steps"), card.get("seconds")
    return {
        **facts,
        "pretraining": route.beginning,
        "step_seconds": round(seconds / steps, 4) if steps and seconds else None,
    }


def unet_facts(route: Route, base: Any) -> dict[str, float | None]:
    """Share of the UNet's tensors that differ from the backbone's, and their relative distance.

    None for a UNet of another shape, which began as something else.
    """
    ours, theirs = route.pipe.unet.state_dict(), base.unet.state_dict()
    shapes = [{name: weight.shape for name, weight in one.items()} for one in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return {"unet_tensors_changed": None, "unet_relative_distance": None}
    moved = weight_distance(ours, theirs)
    return {
        "unet_tensors_changed": round(moved.changed, 4),
        "unet_relative_distance": round(moved.relative, 5),
    }


def token_facts(route: Route, captions: Sequence[str]) -> dict[str, float]:
    """Tokens of a caption in the mean, and the share of captions with a token that stands for anything."""
    if route.translate is not None:
        tokenizer: Any = route.pipe.tokenizer
        cut = [tokenizer(text, add_special_tokens=False).input_ids for text in route.translate(captions)]
        unknown = None  # CLIP's bytes know every text
    else:
        assert route.native is not None
        cut = [route.native.token_ids(text) for text in captions]
        unknown = route.native.tokenizer.unk_token_id
    lost = sum(unknown in ids for ids in cut) if unknown is not None else 0
    return {
        "tokens": round(sum(map(len, cut)) / max(1, len(cut)), 2),
        "unknown": round(lost / max(1, len(cut)), 4),
    }


def kept_states(run: Path) -> list[tuple[int, Path]]:
    """The states that a run kept, by the samples that it had seen, the first one first.

    Raises:
        UserError: there are none.
    """
    files = state_files(run / "states")[::-1]
    if not files:
        raise UserError(
            f"{run} holds no states, by which is told how fast it learned; train it with keep_every, or leave"
            " history out"
        )
    found = []
    for path in files:
        state = read_state(path)
        batch = json.loads(state["run"])["optimizer"]["batch_size"]
        found.append((state.get("samples", state["step"] * batch), path))
    return found


@contextmanager
def as_it_was(route: Route, path: Path) -> Iterator[None]:
    """A route with the averaged weights of one of its run's states; afterwards it has its own again.

    Raises:
        UserError: a state that does not say whose its weights are, or of another model.
    """
    state = read_state(path)
    if "names" not in state:
        raise UserError(f"{path} does not say whose its averaged weights are; train the run again")
    averages = dict(zip(state["names"], state["ema"]["average"], strict=True))
    own = _parameters(route)
    if wrong := [name for name in averages if name not in own or own[name].shape != averages[name].shape]:
        raise UserError(f"{path} holds {wrong[0]!r}, which the model in {route.model} has not")
    before = {name: own[name].detach().clone() for name in averages}
    _set(own, averages)
    try:
        yield
    finally:
        _set(own, before)


@torch.no_grad()
def _set(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        own[name].copy_(weight)


def _parameters(route: Route) -> dict[str, Tensor]:
    """A route's weights by the names that training gives them ("PART.NAME")."""
    parts: dict[str, Any] = {"unet": route.pipe.unet}
    if route.slot == "branch":
        parts["branch"] = route.pipe.branch
    if route.native is not None:
        parts |= {"text_encoder": route.native.model, "connector": route.native.connector}
    parts |= {
        f"cross_attention_{place.replace('.', '_')}": module
        for place, module in cross_attention(route.pipe.unet, "all").items()
    }
    return {
        f"{part}.{name}": weight
        for part, module in parts.items()
        if isinstance(module, nn.Module)
        for name, weight in module.named_parameters()
    }
