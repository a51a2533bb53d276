"""How models are loaded: diffusers' options of ``from_pretrained``, under its names and with its meaning."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import torch

from ..errors import UserError, first_line
from .choice import FileChoice
from .weights import ANY_FILES, DTYPES

#: A dtype as users write it: torch's, its name ("float16", "fp16"), "auto" for the file's own, or, where
#: there are parts, a mapping by part and "default".
Dtype = torch.dtype | str | Mapping[str, torch.dtype | str] | None

#: One device for everything: its name, torch's, its number, or the map ``{"": device}``.
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None


class FileKeywords(TypedDict, total=False):
    """Which files are read, and where their weights come to lie.

    Attributes:
        variant: "fp16" reads ``model.fp16.safetensors`` in place of ``model.safetensors``.
        use_safetensors: True reads no pickle, False nothing else; None prefers safetensors.
        device_map: the device the model comes to lie on; the CPU by default.
        local_files_only: take a hub's model from the local cache and ask no server.
        cache_dir: folder of that cache.
        force_download: download again.
        revision: branch, tag or commit on the hub.
        token: for private models on the hub.
        low_cpu_mem_usage: taken for compatibility; weights are never held twice.
    """

    variant: str | None
    use_safetensors: bool | None
    device_map: DeviceMap
    local_files_only: bool | None
    cache_dir: str | Path | None
    force_download: bool | None
    revision: str | None
    token: str | bool | None
    low_cpu_mem_usage: bool | None


class LoadKeywords(FileKeywords, total=False):
    """What every ``from_pretrained`` here takes besides its source; all of it may be left out.

    Attributes:
        dtype: of the weights; "auto" keeps the file's.
        torch_dtype: the older name of ``dtype``.
    """

    dtype: Dtype
    torch_dtype: Dtype


#: The options by name.
_KNOWN = tuple(dict.fromkeys(["dtype", "torch_dtype", *get_type_hints(LoadKeywords)]))

_HUB = ("local_files_only", "cache_dir", "force_download", "revision", "token")

#: What diffusers and transformers take and this library does not do. Callers that hand on all of their
#: options name them without a value; that asks for nothing.
_NOT_DONE = (
    "attn_implementation", "custom_pipeline", "custom_revision", "disable_mmap", "flashpack_kwargs",
    "ignore_mismatched_sizes", "load_connected_pipeline", "max_memory", "mirror", "offload_folder",
    "offload_state_dict", "output_loading_info", "parallel_config", "provider", "provider_options",
    "proxies", "quantization_config", "resume_download", "sess_options", "trust_remote_code",
    "use_flashpack", "use_onnx",
)  # fmt: skip


@dataclass(frozen=True)
class LoadOptions:
    """``LoadKeywords``, read and checked.

    Attributes:
        dtype: of the weights; None keeps the file's.
        dtypes: of parts that have one of their own.
        device: where the model comes to lie; None leaves it on the CPU.
        files: which of a folder's files are read.
        hub: what the hub is told.
    """

    dtype: torch.dtype | None = None
    dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    device: torch.device | None = None
    files: FileChoice = ANY_FILES
    hub: Mapping[str, Any] = field(default_factory=dict)

    def dtype_of(self, part: str) -> torch.dtype | None:
        """Of a part's weights; None keeps the file's."""
        return self.dtypes.get(part, self.dtype)

    def elsewhere(self) -> Mapping[str, Any]:
        """What the hub is told of another model; a revision is one model's own."""
        return {name: value for name, value in self.hub.items() if name != "revision"}


def read_options(
    options: Mapping[str, Any], reader: str, default: torch.dtype | None, parts: Collection[str] = ()
) -> LoadOptions:
    """Check what a ``from_pretrained`` was given.

    Args:
        options: the keywords; see ``LoadKeywords``.
        reader: for messages, such as "BranchModel.from_pretrained".
        default: dtype where none is asked for; None keeps the file's.
        parts: names under which a mapping may ask for dtypes, beside "default".

    Raises:
        UserError: an unknown option, one that is not done here, or a value that has no meaning.
    """
    _refuse_unknown(options, reader, parts)
    asked = _one_dtype(options, reader)
    if isinstance(asked, Mapping):
        dtypes = _part_dtypes(asked, reader, parts)
        dtype = dtypes.pop("default", torch.float32)  # as in diffusers
    else:
        dtypes, dtype = {}, default if asked is None else read_dtype(asked, reader)
    variant = options.get("variant")
    if variant is not None and not (isinstance(variant, str) and variant.replace("_", "").isalnum()):
        raise UserError(f"{reader}: variant {variant!r} is none; give a name such as 'fp16'")
    return LoadOptions(
        dtype, dtypes, read_device(options.get("device_map"), reader),
        FileChoice(variant, options.get("use_safetensors")),
        {name: options[name] for name in _HUB if options.get(name) is not None},
    )  # fmt: skip


def read_dtype(asked: Any, reader: str) -> torch.dtype | None:
    """A dtype of weights out of what a user wrote; None keeps the file's.

    Raises:
        UserError: no dtype of weights.
    """
    if asked == "auto":
        return None
    named = str(asked).removeprefix("torch.")
    found = DTYPES.get(named) or getattr(torch, named, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(
            f"{reader}: {asked!r} is no dtype of weights; give one such as torch.float16, or 'auto' for the"
            " file's own"
        )
    return found


def read_device(asked: Any, reader: str) -> torch.device | None:
    """The device of a ``device_map``; None where none is asked for.

    Raises:
        UserError: no device, one that is not there, or a map over several.
    """
    one: Any = asked[""] if isinstance(asked, Mapping) and set(asked) == {""} else asked
    if one is None:
        return None
    try:
        device = torch.device(one)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"{reader}: device_map {asked!r} is no device that can be used ({first_line(error)}); give one"
            " for everything, such as 'cuda', or call enable_model_cpu_offload() on the pipeline"
        ) from None
    return device


def _refuse_unknown(options: Mapping[str, Any], reader: str, parts: Collection[str]) -> None:
    known = [*_KNOWN, *parts]
    for name, value in options.items():
        if name in _NOT_DONE:
            if value:
                raise UserError(f"{reader} does not do {name}; leave it out")
        elif name not in _KNOWN:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            raise UserError(f"{reader} takes no option {name!r}; {hint}")


def _one_dtype(options: Mapping[str, Any], reader: str) -> Any:
    """What is asked for under either name."""
    given = [options[name] for name in ("dtype", "torch_dtype") if options.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(f"{reader}: dtype is {given[0]} and torch_dtype {given[1]}; give one of them")
    return given[0] if given else None


def _part_dtypes(
    asked: Mapping[str, Any], reader: str, parts: Collection[str]
) -> dict[str, torch.dtype | None]:
    if not parts:
        raise UserError(f"{reader}: dtype is a mapping, and one model has one dtype; give a single one")
    if extra := [name for name in asked if name not in parts and name != "default"]:
        raise UserError(f"{reader}: dtype names the unknown part {extra[0]!r}; parts are {', '.join(parts)}")
    return {name: read_dtype(dtype, reader) for name, dtype in asked.items()}
