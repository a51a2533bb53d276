"""Prompts that cannot share a batch, drawn apart and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, quoted, whole_number

#: Draws prompts by their indices, with the inputs and control pictures of these alone.
Draw = Callable[[list[int], dict[str, Any], Any], Any]

#: Inputs that say something of the whole call, whatever they hold.
_OF_THE_CALL = {"timesteps", "sigmas", "cross_attention_kwargs", "callback_on_step_end_tensor_inputs"}


def as_seed(seed: SupportsIndex) -> int:
    """A seed as torch takes it.

    Raises:
        UserError: no whole number from 0 to 2^63 - 1.
    """
    number = whole_number(seed)
    if number is None or not 0 <= number < 2**63:
        raise UserError(f"seed {quoted(seed)}: give a whole number from 0 to {2**63 - 1}")
    return number


def as_count(count: SupportsIndex | None, name: str = "num_images_per_prompt") -> int:
    """How many pictures of each prompt, or steps, are asked for; None is one.

    Raises:
        UserError: no whole number from 1 on.
    """
    number = 1 if count is None else whole_number(count)
    if number is None or number < 1:
        raise UserError(f"{name} {quoted(count)}: give a whole number from 1 on")
    return number


def draw_in_groups(draw: Draw, groups: Sequence[list[int]], inputs: dict[str, Any], control: Any) -> Any:
    """Draw each group of prompts for itself and give the pictures in the order of the prompts.

    Args:
        draw: draws some prompts.
        groups: indices of the prompts that are drawn together.
        inputs: of the stock pipeline, for all P prompts.
        control: condition pictures, by name or of a single ControlNet.

    Returns:
        The stock pipeline's output.

    Raises:
        UserError: an input that nothing tells how to divide.
    """
    if len(groups) == 1:
        return draw(groups[0], inputs, control)
    prompts, each = sum(map(len, groups)), inputs["num_images_per_prompt"]
    results, order = [], []
    for group in groups:
        samples = [i * each + k for i in group for k in range(each)]
        order += samples
        own = {name: _divided(name, value, group, samples, prompts, each) for name, value in inputs.items()}
        results.append(draw(group, own, _control_of(control, group, samples, prompts, each)))
    places = sorted(range(len(order)), key=order.__getitem__)
    return _joined(results, places)


def _control_of(control: Any, group: list[int], samples: list[int], prompts: int, each: int) -> Any:
    if isinstance(control, Mapping):
        return {name: _divided(name, value, group, samples, prompts, each) for name, value in control.items()}
    return _divided("control_images", control, group, samples, prompts, each)


def _divided(name: str, value: Any, group: list[int], samples: list[int], prompts: int, each: int) -> Any:
    """What an input is for some of the prompts."""
    many = isinstance(value, list | tuple | Tensor | np.ndarray) and name not in _OF_THE_CALL
    if not many or isinstance(value, Image.Image) or len(value) == 1:
        return value
    if len(value) == prompts * each and (each == 1 or name in ("generator", "latents")):
        return _taken(value, samples)
    if len(value) == prompts and (each == 1 or name == "control_images"):
        return _taken(value, group)
    raise UserError(
        f"prompts of different lengths are drawn apart, and nothing tells which of {len(value)} {name} belong"
        f" to which of {prompts} prompts x {each} images; give one, one for each prompt with"
        " num_images_per_prompt=1, or prompts of one length"
    )


def _taken(value: Any, indices: list[int]) -> Any:
    return [value[i] for i in indices] if isinstance(value, list | tuple) else value[indices]


def _joined(results: list[Any], places: list[int]) -> Any:
    """One output of several; pictures are put in their places."""
    if isinstance(results[0], tuple):
        return tuple(_sorted(list(values), places) for values in zip(*results, strict=True))
    names = [field.name for field in dataclasses.fields(results[0])]
    fields = {name: _sorted([getattr(result, name) for result in results], places) for name in names}
    return type(results[0])(**fields)


def _sorted(values: list[Any], places: list[int]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return torch.cat(values)[places]
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)[places]
    together = [item for value in values for item in value]
    return [together[i] for i in places]
