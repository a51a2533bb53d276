"""States in the layout of a single process: gathered from, and given to, tensors that are split.

So a run can go on in another way or with another number of processes. All of it is joint work: every process
must call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

#: What becomes of each tensor of a state that is to be written; joint work.
Collect = Callable[[Tensor], Any]


def whole(keep: bool, copy: Callable[[Tensor], Tensor] | None = None) -> Collect:
    """Collects whole tensors on the CPU, or None in their places where ``keep`` is not set.

    Args:
        keep: whether this process keeps them.
        copy: makes a tensor's copy on the CPU; a fresh one without.
    """

    def collect(tensor: Tensor) -> Tensor | None:
        joined = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return (copy or on_cpu)(joined.detach()) if keep else None

    return collect


def on_cpu(tensor: Tensor) -> Tensor:
    """A fresh copy on the CPU."""
    return tensor.to("cpu", copy=True)


def collected(tree: Any, collect: Collect) -> Any:
    """A state with what ``collect`` makes of its tensors."""
    return tree_map_only(Tensor, collect, tree)


def gathered(tree: Any, keep: bool) -> Any:
    """A copy of a state with whole tensors on the CPU, or None in their places where ``keep`` is not set."""
    return collected(tree, whole(keep))


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_as(piece: Tensor, like: Tensor) -> Tensor:
    """This process's piece, on whatever device, as the tensor that it is of: split as ``like``."""
    if not isinstance(like, DTensor):
        return piece
    shape, stride = like.shape, like.stride()
    piece = piece.to(like.device)
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=shape, stride=stride)


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is kept.

    Split, and in its memory format, by which fused optimizers pair their tensors.

    Tensors of another shape, such as step counters, stay as they are.
    """
    if whole.shape != like.shape:
        return whole
    if isinstance(like, DTensor):
        return distribute_tensor(
            whole.to(like.device).contiguous(), like.device_mesh, like.placements, src_data_rank=None
        )
    return torch.empty_like(like, dtype=whole.dtype).copy_(whole)


def part_state(part: nn.Module, collect: Collect) -> dict[str, Any]:
    """What ``collect`` makes of the tensors of a part that may be split."""
    copies: dict[tuple[int, torch.Size], Any] = {}

    def once(tensor: Tensor) -> Any:
        # Weights that are one stay one. Pieces of split ones may be empty, which are at no place.
        if isinstance(tensor, DTensor):
            return collect(tensor)
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            copies[key] = collect(tensor)
        return copies[key]

    return collected(get_model_state_dict(part), once)


def load_part(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a part that may be split."""
    set_model_state_dict(part, dict(state), options=StateDictOptions(full_state_dict=True))
