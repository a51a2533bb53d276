"""States in pieces: each process writes what it has, through ``torch.distributed.checkpoint``.

That library plans who writes what, finds pieces that are missing or there twice, and lets all processes know
when one of them could not write. Files and their reading are our own: its own are pickles, which can run
anything when they are read, have no checksums, and go to a disk only.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, Metadata, StorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..errors import UserError, first_line
from .whole import on_cpu

#: Writes a file of tensors and plain containers, whole or not at all; gives its size in bytes.
Put = Callable[[str, Any], int]
#: Stands for a tensor in what is plain of a state.
_TENSOR = "\0tensor"


class Elsewhere:
    """A tensor that another process writes."""


class Pieces:
    """Collects what this process has to write: its pieces of split tensors, its share of the others.

    Those are the same in all processes; each takes as many bytes of them, by the same count everywhere.

    Args:
        copy: makes a tensor's copy on the CPU.
    """

    def __init__(self, copy: Callable[[Tensor], Tensor] = on_cpu) -> None:
        self._copy, self._own = copy, dist.get_rank()
        self._bytes = [0] * dist.get_world_size()

    def __call__(self, tensor: Tensor) -> Any:
        """A copy of what this process writes of it."""
        if isinstance(tensor, DTensor):
            piece = self._copy(tensor.to_local().detach())
            shape, stride = tensor.shape, tensor.stride()
            return DTensor.from_local(piece, _cpu_mesh(), tensor.placements, shape=shape, stride=stride)
        owner = self._bytes.index(min(self._bytes))
        self._bytes[owner] += tensor.nbytes
        return self._copy(tensor.detach()) if owner == self._own else Elsewhere()


_mesh: list[DeviceMesh] = []


def _cpu_mesh() -> DeviceMesh:
    """All processes in a row, with tensors on the CPU."""
    if not _mesh:
        _mesh.append(init_device_mesh("cpu", (dist.get_world_size(),)))
    return _mesh[0]


def save_pieces(tree: Any, put: Put, publish: Callable[[Any, dict[str, int]], None], group: Any) -> None:
    """Write a state of ``Pieces``; joint work of all processes, in a group that nothing else uses meanwhile.

    Args:
        tree: the same containers in all processes, whose tensors ``Pieces`` collected.
        put: writes a file under a name.
        publish: called in the first process when all files are there, with the layout by which ``join``
            puts them together and their sizes by name.
        group: of processes, with gloo.

    Raises:
        UserError: in all processes, where one of them could not write.
    """
    tensors: dict[str, Tensor] = {}
    plain = _apart(tree, "", tensors)
    writer = _PartWriter(put, lambda about, sizes: publish({"plain": plain, "tensors": about}, sizes))
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        checkpoint.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        causes: list[Any] = [cause for cause, *_ in error.failures.values()]
        own = next((cause for cause in causes if isinstance(cause, UserError)), None)
        raise UserError(str(own) if own else first_line(causes[0])) from None


def join(layout: Mapping[str, Any], read: Callable[[str], Mapping[str, Tensor]]) -> Any:
    """The whole state.

    Args:
        layout: as ``save_pieces`` published it.
        read: gives the content of a file by its name.

    Raises:
        ValueError: pieces are missing.
    """
    wholes = {}
    for name, (dtype, shape, chunks) in layout["tensors"].items():
        wholes[name] = torch.empty(shape, dtype=dtype)
        if sum(math.prod(lengths) for _, lengths, *_ in chunks) != math.prod(shape):
            raise ValueError(f"pieces of {name} are missing")
        for offsets, lengths, file, key in chunks:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
            wholes[name][place] = read(file)[key]
    return _together(layout["plain"], wholes)


class _PartWriter(StorageWriter):
    """Writes a file a process, of the items that were planned for it."""

    def __init__(self, put: Put, publish: Callable[[Any, dict[str, int]], None]) -> None:
        self._put, self._publish = put, publish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between states."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All processes write alike."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it was planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As it was planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file."""
        name = f"part-{dist.get_rank():05d}-{secrets.token_hex(4)}.pt"
        pieces = {str(n): planner.resolve_data(item) for n, item in enumerate(plan.items)}
        size = self._put(name, pieces) if pieces else 0
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, size, (name, str(n))) for n, item in enumerate(plan.items)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Say what there is, in the first process."""
        written = [result for own in results for result in own]
        places = {(result.index.fqn, result.index.offset): result.storage_data for result in written}
        about = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                (list(chunk.offsets), list(chunk.sizes), *places[name, chunk.offsets])
                for chunk in tensor.chunks
                if math.prod(chunk.sizes)
            ]
            about[name] = (tensor.properties.dtype, list(tensor.size), chunks)
        self._publish(about, {result.storage_data[0]: result.size_in_bytes for result in written})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Where it goes is known otherwise."""
        return True


def _apart(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What is plain of a state, with the tensors by their paths beside it."""
    if isinstance(tree, Tensor | Elsewhere):
        if isinstance(tree, Tensor):
            tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {key: _apart(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_apart(value, f"{path}/{i}", tensors) for i, value in enumerate(tree))
    return tree


def _together(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, Mapping):
        if _TENSOR in plain:
            return tensors[plain[_TENSOR]]
        return {key: _together(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return type(plain)(_together(value, tensors) for value in plain)
    return plain
