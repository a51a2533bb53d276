"""States in the layout of a single process: gathered from, and given to, tensors that are split.

So a run can go on in another way or with another number of processes. All of it is joint work: every process
must call it.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def gathered(tree: Any, keep: bool) -> Any:
    """A copy of a state with whole tensors on the CPU, or None in their places where ``keep`` is not set."""

    def gather(tensor: Tensor) -> Tensor | None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().to("cpu", copy=True) if keep else None

    return tree_map_only(Tensor, gather, tree)


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


def part_state(part: nn.Module) -> dict[str, Any]:
    """Copies of the whole tensors of a part that may be split, on the CPU.

    Empty in all processes but the first.
    """
    whole = get_model_state_dict(part, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if any(tensor.device.type != "cpu" for tensor in part.parameters()):
        return whole
    copies: dict[tuple[int, torch.Size], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        # Weights that are one stay one.
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            copies[key] = tensor.clone()
        return copies[key]

    return tree_map_only(Tensor, copy, whole)


def load_part(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a part that may be split."""
    set_model_state_dict(part, dict(state), options=StateDictOptions(full_state_dict=True))
