"""Operations of networks, counted operator by operator: a multiplication with its addition counts as two.

Which operators there are changes from one PyTorch to the next: attention alone is one of a dozen. So whoever
counts also looks for operators that multiply and have no formula here, and goes through work whose sum is
known by hand. What is not known is said, and never taken for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: (operator, arguments, keyword arguments, result) -> operations, or None where they are not known.
Formula = Callable[..., int | None]

#: Words in the names of operators that multiply matrices; what only lays weights out anew is not meant.
_PRODUCTS = re.compile(
    r"(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|addr|matmul|linear|bilinear|trilinear|einsum"
    r"|conv(olution)?([123]d)?|(conv|transpose)[123]d|attention|transformer|mha|rnn|lstm|gru)"
)


@cache
def _formula(operator: Any) -> Formula | None:
    """How the operations of an operator's calls are counted; None for one without products."""
    name, _, overload = operator.name().partition(".")
    bare = name.rpartition("::")[2]
    if bare.startswith("_scaled_dot_product_"):
        return partial(_attention, backward=bare.endswith("_backward"))
    if name in ("mkldnn::_convolution_pointwise", "mkldnn::_linear_pointwise") and not overload:
        return _packed
    known = flop_registry.get(getattr(operator, "_overloadpacket", None))
    if known is not None:
        return lambda args, kwargs, result: known(*args, **kwargs, out_val=result)
    if "reorder" not in bare and any(map(_PRODUCTS.fullmatch, bare.split("_"))):
        return lambda args, kwargs, result: None
    return None


def _attention(args: Sequence[Any], kwargs: Any, result: Any, backward: bool) -> int:
    """Two products, and for their gradients five: the scores are worked out again."""
    query, key, value = args[1:4] if backward else args[:3]
    scores, values = (2 * prod(query.shape[:-1]) * key.shape[-2] * x.shape[-1] for x in (query, value))
    return 3 * scores + 2 * values if backward else scores + values


def _packed(args: Sequence[Any], kwargs: Any, result: Tensor) -> int:
    """A convolution or linear layer in oneDNN's layout."""
    return 2 * result.numel() * prod(args[1].shape[1:])


class Operations:
    """A sum that knows what it lacks.

    Attributes:
        uncounted: names of operators that multiply, and whose operations are not known.
    """

    def __init__(self) -> None:
        self.uncounted: set[str] = set()

    def of(self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
        """Operations of one call."""
        formula = _formula(operator)
        count = 0 if formula is None else formula(args, kwargs, result)
        if count is None:
            self.uncounted.add(operator.name())
        return count or 0


class CountedOperations(TorchDispatchMode):
    """Counts the operations of what runs in the ``with`` block.

    Attributes:
        total: so far.
        operations: what the sum lacks.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total, self.operations = 0, Operations()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and isinstance(func, OpOverload):
            # Operators that are made of others come whole then.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.total += self.operations.of(func, args, kwargs, result)
        return result


@dataclass(frozen=True)
class KnownWork:
    """Work whose operations are known by hand.

    Attributes:
        name: for messages.
        shapes: of its inputs.
        run: does it.
        forward: operations.
        backward: those of the gradients of all inputs, by whichever way is taken.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]
    forward: int
    backward: tuple[int, ...]


def known_works() -> Iterator[KnownWork]:
    """A convolution, a linear layer and an attention."""
    one = 2 * 2 * 64 * 5 * (3 * 9)
    convolve = partial(functional.conv2d, padding=1)
    yield KnownWork("convolution", ((2, 3, 8, 8), (5, 3, 3, 3)), convolve, one, (2 * one,))
    one = 2 * (2 * 7) * 16 * 8
    yield KnownWork("linear layer", ((2, 7, 16), (8, 16)), functional.linear, one, (2 * one,))
    one = 2 * (2 * 4) * 7 * 9 * 16
    attend = functional.scaled_dot_product_attention
    shapes = ((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16))
    # Fused attention works its scores out again.
    yield KnownWork("attention", shapes, attend, 2 * one, (4 * one, 5 * one))


def miscounted(make: Callable[[tuple[int, ...]], Tensor], total: Callable[[], int]) -> list[str]:
    """Names of the known works whose operations are not counted as they are known.

    Args:
        make: a tensor of a shape, where work with it is counted.
        total: operations counted so far.
    """
    wrong = []
    for work in known_works():
        inputs = [make(shape).requires_grad_() for shape in work.shapes]
        counts = [total()]
        result = work.run(*inputs)
        counts.append(total())
        result.sum().backward()
        counts.append(total())
        if counts[1] - counts[0] != work.forward or counts[2] - counts[1] not in work.backward:
            wrong.append(work.name)
    return wrong


@cache
def miscounted_on(device: str) -> tuple[str, ...]:
    """The same of ``CountedOperations`` on a device."""
    with torch.enable_grad(), CountedOperations() as counter:
        return tuple(miscounted(partial(torch.ones, device=device), lambda: counter.total))
