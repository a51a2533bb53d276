"""Which models prepared a cache.

Hashes of what decides the features, and the refusal of a cache made with others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..formats.weights import read_json
from ..text.native import NativeTextEncoder

#: How many of a VAE's weights are told of in a sketch.
SKETCHED = 8


def vae_fingerprint(vae: Any) -> str:
    """Of what turns pictures into posterior moments.

    VAEs that differ in their decoder alone have the same.
    """
    tensors = {
        name: t for name, t in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))
    }
    return _digest(tensors, {"norm_groups": vae.config["norm_num_groups"]})


def vae_sketch(vae: Any) -> dict[str, Any]:
    """A few numbers of what turns pictures into latents, which its storing in half precision leaves alike."""
    weights = vae.state_dict()
    names = [name for name in sorted(weights) if name.startswith(("encoder.", "quant_conv."))]
    some = names[:: max(1, len(names) // SKETCHED)][:SKETCHED]
    norms = [round(float(weights[name].float().norm()), 4) for name in some]
    return {"scaling_factor": round(vae.config["scaling_factor"], 5), "norms": norms}


def same_latents(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sketches are of VAEs that make the same latents of a picture, or nearly so.

    Those that somebody trained further, as for drawings, stay within the tolerance.
    """
    a, b = ([said["scaling_factor"], *said["norms"]] for said in (one, other))
    return len(a) == len(b) and all(abs(x - y) <= 0.1 * abs(y) for x, y in zip(a, b, strict=True))


def refuse_other_vae(folder: str | Path, vae: Any, model: object) -> None:
    """Refuse a branch whose card says that it learned latents of another VAE; one that says nothing passes.

    Args:
        folder: the branch's.
        vae: of the model that it is used with.
        model: that model, for messages.

    Raises:
        UserError: names both.
    """
    card = Path(folder) / "card.json"
    said = read_json(card).get("vae") if card.is_file() else None
    if said is not None and _is_sketch(said) and not same_latents(said, vae_sketch(vae)):
        raise UserError(
            f"the branch {folder} learned the latents of another VAE than {model}'s; use the backbone that it"
            " was trained on, or train a branch on this one"
        )


def _is_sketch(said: Any) -> bool:
    if not isinstance(said, dict) or not isinstance(said.get("norms"), list):
        return False
    return all(isinstance(number, int | float) for number in (said.get("scaling_factor"), *said["norms"]))


def text_fingerprint(encoder: NativeTextEncoder) -> str:
    """Of what turns native texts into features: weights, connector, vocabulary and settings."""
    config: Any = encoder.model.config
    beyond = {
        name: getattr(config, name, None) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")
    }
    tensors = dict(encoder.model.state_dict())
    if encoder.connector is not None:
        tensors |= {f"connector.{name}": t for name, t in encoder.connector.state_dict().items()}
    return _digest(tensors, _tokens(encoder) | beyond | {"mask": encoder.settings.mask})


def tokens_fingerprint(encoder: NativeTextEncoder) -> str:
    """Of what turns native texts into token ids: vocabulary and settings."""
    return _digest({}, _tokens(encoder))


def check_fingerprints(
    cached: Mapping[str, Mapping[str, str]], own: Mapping[str, tuple[str, str]], origin: str
) -> None:
    """Refuse a cache that was made with other models than those in use.

    Args:
        cached: ``{"vae": {"source": ..., "fingerprint": ...}}`` of the cache, by part.
        own: (source, fingerprint) of the models in use, by part.
        origin: of the cache.

    Raises:
        UserError: naming every part that differs, with both models.
    """
    wrong = [
        f"its {part.replace('_', ' ')} was {made['source']} ({made['fingerprint'][:10]}), "
        f"in use is {own[part][0]} ({own[part][1][:10]})"
        for part, made in cached.items()
        if part in own and made["fingerprint"] != own[part][1]
    ]
    if wrong:
        raise UserError(
            f"{origin} was prepared with other models: {'; '.join(wrong)}; use those models, or prepare the"
            " data again"
        )


def _tokens(encoder: NativeTextEncoder) -> dict[str, Any]:
    settings = {name: value for name, value in encoder.settings.said().items() if name != "mask"}
    return settings | {
        "layout": dataclasses.asdict(encoder.layout),
        "vocabulary": sorted(encoder.tokenizer.get_vocab().items()),
    }


def _digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """sha256 over weights (as float32, so that the precision in use does not matter) and settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
