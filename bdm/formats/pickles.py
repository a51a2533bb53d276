"""Torch pickles, read by a restricted unpickler: nothing in one is ever executed."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, printable
from .header import ZIP

#: More entries, or a longer name, than any model's file holds: nested mappings that a pickle names many times
#: over would otherwise be walked for ever.
_MOST_ENTRIES, _LONGEST_NAME = 100_000, 500

#: numpy's kinds of numbers in the words of ``struct``.
_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B"}


class Inert:
    """Stands for a class that community pickles name beside their tensors; it only keeps what it is given."""

    def __init__(self, *arguments: Any, **__: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> tuple[Any, str]:
    return type(name.rpartition(".")[2], (Inert,), {}), name


#: Harmless names in old Stable Diffusion checkpoints (the trainer's callbacks) and A1111 embeddings
#: (parameter containers). None of the real objects is imported or built.
_STAND_INS: list[Any] = [
    _stand_in("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    _stand_in("pytorch_lightning.utilities.types._Metadata"),
    _stand_in("torch.nn.modules.container.ParameterDict"),
    # Counters, losses and alphas that trainers kept as numpy's numbers.
    *(
        _stand_in(f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    _stand_in("numpy.dtype"),
    _stand_in("numpy.ndarray"),
    *(_stand_in(f"numpy.dtypes.{kind}DType") for kind in ("Float16", "Float32", "Float64", "Int32", "Int64")),
]


def unpickle(path: Path, header_only: bool, archive: bool | None = None) -> Any:
    """What a torch pickle holds; objects of the stand-ins are ``Inert``.

    Args:
        path: the file.
        header_only: tensors are on the meta device.
        archive: whether it is a zip archive; looked up if left out.

    Raises:
        UserError: it is damaged, or names anything but tensors and what stands in for harmless classes.
    """
    if archive is None:
        with open(path, "rb") as file:
            archive = file.read(4) == ZIP
    try:
        if archive:
            _check_archive(path)
        where = "meta" if header_only else "cpu"
        with torch.serialization.safe_globals(_STAND_INS), open(path, "rb") as file:
            if path.suffix == ".safetensors":  # which torch would go by
                return torch.load(file, map_location=where, weights_only=True)
            return torch.load(path, map_location=where, weights_only=True, mmap=archive)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds; its text names the refused global
        raise _refusal(path, error) from None


def _refusal(path: Path, error: Exception) -> UserError:
    lines = (line.strip()[:160] for line in str(error).splitlines())
    reason = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), "")
    if "GLOBAL" in reason or "class" in reason:
        return UserError(f"{path} is a pickle that holds more than tensors and was not loaded: {reason}")
    return UserError(
        f"{path} is damaged or not a torch file ({reason or type(error).__name__}); download or save it again"
    )


def _check_archive(path: Path) -> None:
    """torch stores without compression, so an archive that grows on reading was not written by it."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError(
                f"{path} is a compressed archive, which torch never writes; unpack it or download it again"
            )


def entries(content: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """All entries of nested mappings under their whole names, mappings before what they hold.

    A ``"state_dict"`` is unwrapped; what stands directly beside it comes first, its tensors as ``Inert``.
    Keys that are no text name no weights. Numbers of numpy are given as Python's.

    Raises:
        UserError: more entries or longer names than a model has.
    """
    inner = content.get("state_dict")
    found = [_walk(_beside(content)), _walk(inner)] if isinstance(inner, Mapping) else [_walk(content)]
    for count, (name, value) in enumerate(entry for part in found for entry in part):
        if count >= _MOST_ENTRIES or len(name) > _LONGEST_NAME:
            raise UserError(
                f"{path} holds more entries or longer names than a model has ({printable(name, 80)}); it is"
                " damaged or made to harm"
            )
        yield name, value


def _beside(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """What stands beside the weights, none of which is a weight."""
    return {
        key: Inert() if isinstance(value, torch.Tensor) else value
        for key, value in content.items()
        if not isinstance(value, Mapping)
    }


def _walk(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Inert):
            value = _content(value)
        yield name, value
        if isinstance(value, Mapping) and depth < 3:
            yield from _walk(value, f"{name}.", depth + 1)


def _content(inert: Inert) -> Any:
    """What an object stands for: a container's parameters, or one of numpy's numbers."""
    if type(inert).__name__ == "scalar":
        return _number(*inert.arguments) if len(inert.arguments) == 2 else inert
    state = getattr(inert, "state", None)
    return state.get("_parameters", state) if isinstance(state, Mapping) else inert


def _number(kind: Any, content: Any) -> Any:
    """One of numpy's numbers: its kind, such as f4, and its bytes."""
    code = str(kind.arguments[0]) if isinstance(kind, Inert) and kind.arguments else ""
    try:
        return struct.unpack(f"<{_NUMBERS[code]}", content)[0]
    except (KeyError, TypeError, struct.error):
        return kind
