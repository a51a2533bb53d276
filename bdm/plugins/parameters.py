"""The parameters of a live network that plug-ins may act on, and what others have put around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..speed.stand_in import class_of
from ..speed.watched import WatchedParameter

#: The layers whose weights are numbers that can be added to. Subclasses (quantised, sharded ...) are others.
_LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
#: Ordinary parameters, watched (see ``bdm.speed.watched``) or not.
_ORDINARY = (nn.Parameter, WatchedParameter)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: What diffusers hangs in a UNet beside its own layers, for an IP-Adapter.
_ADDED = ("processor", "encoder_hid_proj")
#: diffusers' hooks that keep copies of weights and put these back, or hold them in another dtype.
_KEEPERS = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")


@dataclass(frozen=True)
class Owned:
    """A parameter and where it stands.

    Attributes:
        parameter: the same.
        layer: the module whose parameter it is.
        parent: the module that calls the layer.
        wrapper: peft's layer around it, if a LoRA has been loaded with diffusers or peft.
    """

    parameter: nn.Parameter
    layer: nn.Module
    parent: nn.Module
    wrapper: nn.Module | None = None


def plain(module: nn.Module) -> nn.Module:
    """A network without ``torch.compile``'s wrapping of it."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def owned_parameters(network: nn.Module) -> dict[str, Owned]:
    """A network's parameters under the names that they have without peft's wrappers."""
    found: dict[str, Owned] = {}
    for path, layer, parent, wrapper in _layers(network, "", network, None):
        for name, parameter in layer.named_parameters(path, recurse=False):
            found[name] = Owned(parameter, layer, parent, wrapper)
    return found


def foreign_layers(network: nn.Module) -> dict[str, str]:
    """The layers that keep no parameters where ordinary ones do, such as quantised ones: name -> class."""
    known = ("torch.nn.modules.", "diffusers.", "transformers.", "bdm.")
    return {
        path: _class(layer)
        for path, layer, _, _ in _layers(network, "", network, None)
        if not type(layer).__module__.startswith(known)
        and hasattr(layer, "weight")
        and next(layer.parameters(), None) is None
    }


def _layers(
    module: nn.Module, path: str, parent: nn.Module, wrapper: nn.Module | None
) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module | None]]:
    """(name, module, its parent, peft's wrapper) of all modules; of a wrapper only what it wraps."""
    inner: Any = getattr(module, "base_layer", None)
    if isinstance(inner, nn.Module):
        yield from _layers(inner, path, parent, module)
        return
    yield path, module, parent, wrapper
    for name, child in module.named_children():
        if name in _ADDED:
            continue
        yield from _layers(child, f"{path}.{name}" if path else name, module, None)


def refuse_foreign_hooks(network: nn.Module, part: str) -> None:
    """Refuse a network whose weights others put in place or take away as they like.

    Raises:
        UserError: says what to undo.
    """
    for module in network.modules():
        hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        keeper = next((name for name in hooks if name in _KEEPERS), None)
        if keeper is not None:
            raise UserError(
                f"the {part.replace('_', ' ')} is under diffusers' {keeper.replace('_', ' ')}, which puts"
                " back weights of its own; attach and detach plug-ins before that is enabled"
            )


def refuse_missing(network: nn.Module, part: str, name: str) -> None:
    """Refuse to act on a parameter that a network does not have.

    Raises:
        UserError: says why it has none.
    """
    quantised = foreign_layers(network).get(name.rpartition(".")[0])
    if quantised is not None:
        raise UserError(_not_ordinary(f"{part}.{name} belongs to a {quantised}"))
    raise UserError(
        f"the pipeline's {part} no longer has {name}; undo what was done to it since the plug-in was attached"
    )


def _not_ordinary(what: str) -> str:
    return (
        f"{what} (quantised, sharded or wrapped by other software), to which nothing can be added; attach"
        " plug-ins to an ordinary network, before that is done"
    )


def refuse_foreign(owned: Owned, part: str, name: str, new: bool) -> None:
    """Refuse a parameter that is not, or not alone, what a layer computes with.

    Args:
        owned: the parameter.
        part: of the pipeline.
        name: of the parameter.
        new: something is to be attached; else what was attached is changed or taken off.

    Raises:
        UserError: says what stands in the way, and what to do.
    """
    what = f"{part}.{name}"
    if owned.wrapper is not None and (new or getattr(owned.wrapper, "merged", False)):
        _refuse_wrapper(owned.wrapper, what, new)
    if getattr(owned.parent, "fused_projections", False):
        raise UserError(
            f"{what} is not in use since projections were fused; call unfuse_qkv_projections() first"
        )
    if owned.parameter.is_meta:
        raise UserError(
            f"{what} is offloaded; attach and detach plug-ins before sequential offload is enabled"
        )
    if class_of(owned.layer) not in _LAYERS or type(owned.parameter) not in _ORDINARY:
        raise UserError(_not_ordinary(f"{what} is a {_class(owned.parameter)} of a {_class(owned.layer)}"))
    if owned.parameter.dtype not in _DTYPES:
        raise UserError(
            f"{what} is {owned.parameter.dtype}; plug-ins act on float32, float16 and bfloat16: load the"
            " model in one of these"
        )


def _refuse_wrapper(wrapper: Any, what: str, new: bool) -> None:
    """Say which LoRA stands in the way."""
    names = ", ".join(map(repr, getattr(wrapper, "active_adapters", []) or []))
    fused = " and fused" if getattr(wrapper, "merged", False) else ""
    if new:
        raise UserError(
            f"{what} carries an adapter ({names}) that was loaded{fused} outside of bdm; call"
            f" {'unfuse_lora() and ' if fused else ''}unload_lora_weights() and attach its file with"
            " plugins.attach instead"
        )
    raise UserError(
        f"an adapter ({names}) was fused into {what} since; call unfuse_lora(), then change or detach"
        " plug-ins"
    )


def _class(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


@dataclass(frozen=True)
class Trace:
    """How a weight was left, by a few of its values; enough to see that others have changed it.

    Attributes:
        shape: of the weight.
        values: evenly spread ones, on the CPU.
    """

    shape: torch.Size
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, most: int = 512) -> Trace:
        """The trace of a weight; ``most`` values of it."""
        if not weight.numel():
            return cls(weight.shape, weight.new_empty(0))
        every = torch.arange(0, weight.numel(), max(1, weight.numel() // most), device=weight.device)
        places = torch.unravel_index(every, weight.shape) if weight.ndim else ()
        return cls(weight.shape, weight[places].cpu())

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight is still as it was left.

        A change of dtype, and what rounding leaves where something was added and taken away, do not count.
        """
        now = Trace.of(weight)
        dtypes = (self.values.dtype, torch.bfloat16, torch.float16)
        return now.shape == self.shape and any(
            _close(now.values, self.values.to(dtype).to(now.values.dtype)) for dtype in dtypes
        )


def _close(ours: Tensor, theirs: Tensor) -> bool:
    rounding = 2 * torch.finfo(ours.dtype).eps
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= rounding * theirs.norm())
