"""What a weight file says before its values, read without PyTorch where it is a safetensors file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line, printable
from .strangers import stranger

if TYPE_CHECKING:
    from torch import Tensor

#: PyTorch's names of safetensors' precisions.
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

#: What torch itself writes before a pickle: a zip archive, or (before 1.6) a pickle at once.
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


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


@dataclass(frozen=True)
class TensorHeader:
    """A tensor whose values were not read; stands for it wherever only its shape is asked for.

    Attributes:
        shape: of the tensor.
        dtype: its name, such as "float16".
    """

    shape: tuple[int, ...]
    dtype: str

    #: As of PyTorch's tensors without values.
    is_meta: ClassVar[bool] = True

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether its values are fractions."""
        return "float" in self.dtype

    def reshape(self, *shape: int) -> TensorHeader:
        """The same values in another shape, one side of which may be -1."""
        known = math.prod(side for side in shape if side != -1)
        return TensorHeader(tuple(self.numel() // max(1, known) if s == -1 else s for s in shape), self.dtype)


def read_header(path: str | Path) -> WeightFile:
    """Read a weight file without its values.

    Of a safetensors file the tensors are ``TensorHeader``, and PyTorch is not imported. Of a pickle, which
    only PyTorch can read, they are tensors on the meta device.

    Raises:
        UserError: see ``bdm.formats.weights.read_weights``.
    """
    path = Path(path)
    if is_safetensors(path):
        tensors, metadata = safetensors_header(path)
        stand_ins: dict[str, Any] = dict(tensors)
        return WeightFile(path, stand_ins, metadata)
    from .weights import read_weights

    return read_weights(path, header_only=True)


def safetensors_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Shapes and precisions by name, and the texts, of a safetensors file.

    Raises:
        UserError: header and file do not agree.
    """
    try:
        # Opening checks that header and file agree; the values stay on disk until they are asked for.
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {
                key: TensorHeader(
                    tuple(part.get_shape()), DTYPE_NAMES.get(part.get_dtype(), str(part.get_dtype()).lower())
                )
                for key, part in slices.items()
            }
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise not_whole(path, error) from None


def not_whole(path: Path, error: Exception) -> UserError:
    """What is said of a safetensors file that cannot be read."""
    return UserError(
        f"{path} is not a whole safetensors file ({first_line(error)}); download or save it again"
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file is read as safetensors; else it is a pickle.

    Files are renamed in the wild, so their beginning tells what they are, not their ending.

    Raises:
        UserError: there is no such file, it cannot be read, or is plainly something else than weights.
    """
    if not os.path.isfile(path):  # which takes names of any length
        raise UserError(f"{printable(path, 300)}: no such weight file; check the path")
    start = _beginning(path)
    if looks_like_safetensors(path):
        return True
    if not start.startswith(PICKLE) and (what := stranger(path)):
        raise UserError(f"{path} is {what}")
    return path.suffix.lower() == ".safetensors" and not is_pickle(start)


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is what torch writes, by its first four bytes."""
    return start.startswith((ZIP, PICKLE))


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
