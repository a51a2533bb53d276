"""Weight files: safetensors and pickles that hold nothing but tensors. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, first_line
from ..shipped import find_path
from .choice import FileChoice
from .pickles import entries, is_pickle, unpickle

#: Precisions by the names that configurations and options use.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Safetensors before pickles, full precision before half.
ANY_FILES = FileChoice()

#: Endings of the files that hold weights.
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class WeightFile:
    """A file's tensors by name, and the texts beside them.

    Attributes:
        path: where it lies.
        tensors: by name; names inside nested mappings are joined by dots. On the meta device if only the
            header was read, otherwise views of the mapped file, which take memory as they are used. The file
            must stay as it is while they are in use: written over in place it changes them, and cut short it
            ends the process. Replacing it by renaming another is safe.
        metadata: the safetensors header's texts, or the plain values in a pickle.
        others: kinds of what else a pickle holds, which is not read.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    others: dict[str, str] = field(default_factory=dict)


def resolve_folder(
    source: str | Path,
    subfolder: str | None = None,
    files: list[str] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Path:
    """A local model folder for a path, the name of a shipped one (``assets/emoji``) or a hub name.

    The hub's are downloaded through ``huggingface_hub``; HF_ENDPOINT is honoured.

    Args:
        source: folder or hub name.
        subfolder: folder inside it.
        files: patterns of the files that are wanted of a hub's model, such as ``["*.json"]``; all if None.
        hub: what ``huggingface_hub.snapshot_download`` is told besides, such as ``local_files_only``.

    Raises:
        UserError: a file, a folder that is not there, or a name that the hub does not give.
    """
    path = find_path(source)
    if not os.path.isdir(path):  # which takes names of any length
        if os.path.isfile(path):
            raise UserError(f"{source} is a file; give the folder that holds config.json and the weights")
        if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) != 2:
            raise UserError(
                f"{source}: no such folder; give a local folder or a hub name of the form owner/model"
            )
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(source), allow_patterns=files, **(hub or {})))
        except Exception as error:  # offline, unknown name, no permission: one line for each
            raise UserError(
                f"{source}: neither a local folder nor a model the hub gives ({type(error).__name__}); "
                "give a local folder, or set HF_ENDPOINT to a mirror"
            ) from None
    return path / subfolder if subfolder else path


def is_weight_file(source: str | Path) -> bool:
    """Whether a source is a file of weights, or is called like one that is not there."""
    named = Path(source).suffix.lower() in WEIGHT_SUFFIXES
    return os.path.isfile(source) or (named and not os.path.isdir(source))


def weight_files(folder: Path, choice: FileChoice = ANY_FILES) -> list[Path]:
    """The files that a folder's weights are read from: the preferred whole one, else its shards.

    None if it holds none.
    """
    return choice.find(folder)[0]


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); get the folder again") from None
    return json_object(text, path)


def json_object(text: str, what: object) -> dict[str, Any]:
    """A JSON object out of a file or a header.

    Args:
        text: JSON.
        what: for messages.

    Raises:
        UserError: not JSON, nested too deep, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read as JSON ({first_line(error)}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} holds a JSON {type(content).__name__}, not an object; get it again")
    return content


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
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such weight file; check the path")
    # Files are renamed in the wild, so their beginning tells what they are, not their ending.
    start = _beginning(path)
    if looks_like_safetensors(path) or (path.suffix.lower() == ".safetensors" and not is_pickle(start)):
        return _read_safetensors(path, header_only)
    return _read_pickle(path, header_only)


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a header within it, and with a JSON object.

    Raises:
        UserError: it cannot be read.
    """
    start = _beginning(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _read_safetensors(path: Path, header_only: bool) -> WeightFile:
    try:
        # Opening checks that header and file agree; the values stay on disk until they are asked for.
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {} if header_only else {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header_only:
            with open(path, "rb") as raw:
                header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
            header.pop("__metadata__", None)
            tensors = {
                key: torch.empty(
                    entry["shape"], dtype=_SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8), device="meta"
                )
                for key, entry in header.items()
            }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); download or save it again"
        ) from None
    return WeightFile(
        path, {key: _plain(tensor, key, path, header_only) for key, tensor in tensors.items()}, metadata
    )


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
        raise UserError(f"{path}: {name} is a {kinds[0]} tensor; give a file of plain weights")
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
            f"{source}: {name} holds {largest:g}, and {precision} ends at {_largest(dtype):g}; choose"
            f" {'float32' if dtype == torch.bfloat16 else 'bfloat16 or float32'}"
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
                f"{source}: {name} holds NaN or infinite values; the file is damaged, get it again"
            )
