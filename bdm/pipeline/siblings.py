"""Another kind of pipeline around a pipeline's parts, with what is attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from .groups import as_count, as_seed


def sibling(pipe: Any, kind: Any) -> Any:
    """A pipeline of another kind that draws with the same networks, scheduler, plug-ins and branches.

    Args:
        pipe: a bilingual pipeline.
        kind: the other's class.
    """
    if type(pipe) is kind:
        return pipe
    made = kind.from_pipe(pipe)
    # One registry: what hangs on the networks is known, and asked for its pictures, in both.
    made._plugins = pipe.plugins
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def count_samples(call: Mapping[str, Any]) -> int:
    """How many pictures a call asks for."""
    prompt = call.get("prompt")
    if prompt is None and call.get("prompt_embeds") is not None:
        prompts = len(call["prompt_embeds"])
    else:
        prompts = 1 if isinstance(prompt, str) or prompt is None else len(prompt)
    return prompts * as_count(call.get("num_images_per_prompt"))


def with_generators(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose seed is a generator for each picture, so that several passes go on with them.

    Raises:
        UserError: both a seed and generators.
    """
    if call.get("seed") is None:
        return dict(call)
    if call.get("generator") is not None:
        raise UserError("both seed and generator are given; give one of them")
    first = as_seed(call["seed"])
    generators = [torch.Generator().manual_seed(first + i) for i in range(count_samples(call))]
    return {**call, "seed": None, "generator": generators}
