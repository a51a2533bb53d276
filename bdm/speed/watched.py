"""Parameters that tell when anybody asks for their values.

What is worked out from a weight and kept (a packed or folded kernel) is right as long as nobody has written
to the weight, and PyTorch counts no writing through ``.data`` or an alias. So a weight that something was
kept of is watched instead: whatever operation, property or method asks for more than its shape, dtype or
device ends the watch first, and with it what was kept. Since an alias may be written to later, a weight that
was asked for is not watched again until somebody says that it may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WATCHER = "_bdm_watcher"
_ENDING = threading.RLock()


#: What needs no values, so that it may be asked of a watched weight.
_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "is_meta",
    "is_cpu", "is_cuda", "is_quantized", "is_sparse", "is_mkldnn", "is_nested",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_inference",
    "__len__", "requires_grad_",
)  # fmt: skip
_HARMLESS: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in _METHODS),
    vars(torch._C.TensorBase)["requires_grad"].__set__,
}


class WatchedParameter(nn.Parameter):
    """A parameter while it is watched; the same object is an ordinary one before and afterwards."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, on ordinary parameters unless it needs no values."""
        if func not in _HARMLESS:
            for value in (*args, *(kwargs or {}).values()):
                _end_all(value)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        end_watch(self)
        copy: Any = nn.Parameter.__deepcopy__(self, memo)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        end_watch(self)
        return nn.Parameter.__reduce_ex__(self, protocol)


def watch(parameter: nn.Parameter, ended: Callable[[], None]) -> bool:
    """Call ``ended()`` once, before anybody gets at a parameter's values.

    Returns:
        Whether it is watched; not where something else watches it, or where it is no ordinary parameter.
    """
    with _ENDING:
        if type(parameter) is not nn.Parameter:
            return False
        vars(parameter)[_WATCHER] = ended
        parameter.__class__ = WatchedParameter
        return True


def end_watch(parameter: Tensor) -> None:
    """Make a watched parameter an ordinary one again; nothing happens to any other."""
    if type(parameter) is WatchedParameter:
        with _ENDING:
            ended = vars(parameter).pop(_WATCHER, None)
            parameter.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]
            if ended is not None:
                ended()


def _end_all(value: Any) -> None:
    """End the watch of the parameters in a value, however deep they lie in it."""
    if isinstance(value, WatchedParameter):
        end_watch(value)
    elif isinstance(value, Mapping):
        _end_all(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            _end_all(item)
