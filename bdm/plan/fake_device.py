"""A device that works out shapes only.

What a step allocates and computes, without memory, weights or a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .operations import Operations, miscounted

aten = torch.ops.aten


@contextmanager
def normalisations_in_float32() -> Iterator[None]:
    """Inside the ``with`` block, mixed precision spares the normalisations as under CUDA's autocast.

    The CPU's does not.

    The functions are replaced, because modes for functions are off in the backward pass, where checkpoints
    run them again.
    """

    def spared(plain: Callable[..., Any]) -> Callable[..., Any]:
        def norm(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = (tree_map_only(Tensor, lambda x: x.float(), part) for part in (args, kwargs))
            return plain(*args, **kwargs)

        return norm

    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            plain = getattr(nn.functional, name)
            stack.callback(setattr, nn.functional, name, plain)
            setattr(nn.functional, name, spared(plain))
        yield


class BlankNumpy(TorchFunctionMode):
    """Turns fake tensors into blank arrays."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            return np.zeros(args[0].shape, str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


class FakeDevice(TorchDispatchMode):
    """Inside the ``with`` block what is worked out with placed tensors has shapes but no values, and its
    memory is counted.

    Every other tensor stays real, so that whatever decides about a batch works as ever; where the two meet
    the result is fake, too. A number that is read from a fake tensor is 1 (or False): it must not decide
    about shapes.

    Attributes:
        label: what memory and operations are counted as from now on.
        flops: operations so far, by label; a multiplication with its addition counts as two.
        operations: what they lack.
        live: bytes in use, by label.
        peak: most bytes in use at once.
        at_peak: how they were made up, by label.
        largest_convolution: most bytes of one convolution's inputs and outputs.
        kept: what is to stay in memory for as long as the device is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.flops: Counter[str] = Counter()
        self.operations = Operations()
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.largest_convolution = 0
        self.kept: list[Any] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._labels: dict[int, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FakeDevice:
        # Real tensors are the rule inside: the fake mode is only entered for operations that meet a fake one.
        self._stack.enter_context(normalisations_in_float32())
        self._stack.enter_context(BlankNumpy())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is aten._local_scalar_dense.default and (isinstance(args[0], FakeTensor) or args[0].is_meta):
            return False if args[0].dtype == torch.bool else 1
        if not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*_on_one_device(args, tensors), **_on_one_device(kwargs, tensors))
        with self._fake:
            result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor):
                self._note(x)
        self.flops[self.label] += self.operations.of(func, args, kwargs, result)
        if "convolution" in func.name():
            self.largest_convolution = max(
                self.largest_convolution, sum(map(_bytes, [*tensors, *tree_leaves(result)]))
            )
        return result

    def blank(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fake tensor of a storage of its own."""
        return self._placed(torch.empty(shape, dtype=dtype, device="meta"))

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.live.total(), dict(self.live)

    def place(self, module: nn.Module, label: Callable[[Tensor], str]) -> None:
        """Move a module's weights and buffers here, each under its label."""
        placed: dict[int, Any] = {}
        for part in module.modules():
            for group in (part._parameters, part._buffers):
                for name, tensor in group.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        if id(tensor) not in placed:
                            self.label = label(tensor)
                            placed[id(tensor)] = self._placed(tensor)
                        group[name] = placed[id(tensor)]

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's memory as something else."""
        storage = tensor.untyped_storage()
        self.live[self._labels[storage._cdata]] -= storage.nbytes()
        self.live[label] += storage.nbytes()
        self._labels[storage._cdata] = label

    def _placed(self, tensor: Tensor) -> Tensor:
        fake = FakeTensor(self._fake, tensor.detach().to("meta"), torch.device("cpu"))
        self._note(fake)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._labels:
            return
        self._labels[storage._cdata] = self.label
        self.live[self.label] += storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False
        if (total := self.live.total()) > self.peak:
            self.peak, self.at_peak = total, dict(self.live)

    def _forget(self, key: int, size: int) -> None:
        self.live[self._labels.pop(key)] -= size


@cache
def miscounted_in_plans() -> tuple[str, ...]:
    """What this PyTorch does in a way whose operations are not counted here (see ``miscounted``)."""
    fake = FakeDevice()
    with torch.enable_grad(), fake:
        return tuple(miscounted(lambda shape: fake.blank(*shape), fake.flops.total))


def _on_one_device(values: Any, tensors: list[Tensor]) -> Any:
    """Beside tensors on the meta device all others go there too."""
    if not any(x.is_meta for x in tensors) or all(x.is_meta for x in tensors):
        return values
    return tree_map_only(Tensor, lambda x: x.to("meta"), values)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
