"""Weight files: safetensors and pickles that hold nothing but tensors. Nothing in a file is ever executed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, printable
from .choice import FileChoice
from .folders import ANY_FILES as ANY_FILES
from .folders import json_object as json_object
from .folders import read_json as read_json
from .folders import resolve_folder as resolve_folder
from .folders import weight_files as weight_files
from .header import DTYPE_NAMES, is_safetensors, not_whole, safetensors_header
from .header import WeightFile as WeightFile
from .pickles import entries, unpickle

#: Precisions by the names that configurations and options use.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Endings of the files that hold weights.
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def is_weight_file(source: str | Path) -> bool:
    """Whether a source is a file of weights, or is called like one that is not there."""
    named = Path(source).suffix.lower() in WEIGHT_SUFFIXES
    return os.path.isfile(source) or (named and not os.path.isdir(source))


def read_weights_folder(folder: Path, choice: FileChoice = ANY_FILES) -> dict[str, Tensor]:
    """The tensors of the weight file in a folder, sharded or not.

    Raises:
        UserError: no weight file, a missing shard, or what ``read_weights`` refuses.
    """
    files, index = choice.find(folder)
    if index:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise UserError(f"{index} names no files of weights (weight_map); get the folder again")
        named = set(listed.values())
        if missing := sorted(named - {shard.name for shard in files}):
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(named)} files that its index names, such as"
                f" {missing[0]}"
            )
        files = [shard for shard in files if shard.name in named]
    if not files:
        raise UserError(f"{folder} holds no weights; looked for {', '.join(choice.names())}")
    return {key: tensor for file in files for key, tensor in read_tensors(file).items()}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name (see ``read_weights``)."""
    return read_weights(path).tensors


def read_weights(path: str | Path, header_only: bool = False) -> WeightFile:
    """Read a weight file.

    Args:
        path: ``.safetensors``, or a torch pickle (``.bin``, ``.pt``, ``.pth``, ``.ckpt``). Pickles go through
            torch's restricted unpickler, which refuses every global but those that rebuild tensors. A
            top-level ``"state_dict"`` is unwrapped.
        header_only: read names, shapes and texts, but no values.

    Raises:
        UserError: missing, truncated or malformed file; a pickle that names anything but tensors, or holds
            sparse, quantised or complex ones.
    """
    path = Path(path)
    return _read_safetensors(path, header_only) if is_safetensors(path) else _read_pickle(path, header_only)


def _read_safetensors(path: Path, header_only: bool) -> WeightFile:
    headers, metadata = safetensors_header(path)
    if header_only:
        tensors = {
            key: torch.empty(header.shape, dtype=_dtype(header.dtype), device="meta")
            for key, header in headers.items()
        }
        return WeightFile(path, tensors, metadata)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in headers}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise not_whole(path, error) from None
    return WeightFile(path, {key: _plain(t, key, path, header_only) for key, t in tensors.items()}, metadata)


def _dtype(name: str) -> torch.dtype:
    """A precision by its name; uint8 stands for those that PyTorch does not know."""
    return getattr(torch, name) if name in DTYPE_NAMES.values() else torch.uint8


def _read_pickle(path: Path, header_only: bool) -> WeightFile:
    content = unpickle(path, header_only)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in entries(content, path) if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            tensors[name] = _plain(value, name, path, header_only)
        elif isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 64):
            metadata[name] = str(value)
        elif not isinstance(value, Mapping):
            others[name] = type(value).__name__
    if not tensors:
        raise UserError(
            f"{path} holds {type(content).__name__} that is not a mapping of names to tensors; give a weight"
            " file"
        )
    _check_sizes(path, tensors)
    return WeightFile(path, tensors, metadata, others)


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A view with stride 0 may claim any size from a few bytes."""
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 2 * path.stat().st_size:
        raise UserError(
            f"{path} claims tensors larger than the file; it is damaged or made to exhaust memory"
        )


def _plain(tensor: Tensor, name: str, path: Path, header_only: bool) -> Tensor:
    """A tensor without its history, refused unless its values lie one beside the other."""
    odd = {
        "sparse": tensor.layout != torch.strided,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "empty (meta)": tensor.is_meta and not header_only,
    }
    if kinds := [kind for kind, so in odd.items() if so]:
        raise UserError(
            f"{path}: {printable(name, 120)} is a {kinds[0]} tensor; give a file of plain weights"
        )
    return tensor.detach()


def is_finite(tensor: Tensor) -> bool:
    """Whether weights hold neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # no kernel compares 8-bit floats; this holds them all
        tensor = tensor.bfloat16()
    # NaN is passed on by both, infinity is one of them: one pass at memory's speed.
    return all(math.isfinite(bound.item()) for bound in tensor.detach().aminmax()) if tensor.numel() else True


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str, source: object) -> Tensor:
    """A weight in another precision.

    Args:
        tensor: the weight.
        dtype: None keeps its own.
        name: of the weight, for messages.
        source: what it is of, for messages.

    Raises:
        UserError: a value that the precision cannot hold.
    """
    if dtype in (None, tensor.dtype):
        return tensor
    kept = tensor.to(dtype)
    if not tensor.is_floating_point() or _largest(dtype) >= _largest(tensor.dtype):
        return kept
    if not kept.is_meta and not is_finite(kept) and is_finite(tensor):
        largest = tensor.double().abs().max().item()
        precision = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{source}: {printable(name, 120)} holds {largest:g}, and {precision} ends at"
            f" {_largest(dtype):g}; choose {'float32' if dtype == torch.bfloat16 else 'bfloat16 or float32'}"
        )
    return kept


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        UserError: names the first one.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{source}: {printable(name, 120)} holds NaN or infinite values; the file is damaged, get it"
                " again"
            )
