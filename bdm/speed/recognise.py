"""What a saving knows completely. Anything else takes the plain way."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..method.hooks import Hook, hooks_of
from ..method.step import UNetCall
from .stand_in import class_of
from .watched import WatchedParameter

#: Where the classes of known modules are defined.
_KNOWN_ROOMS = ("torch.nn.modules.", "diffusers.models.", "bdm.method.", "bdm.speed.")
#: Processors that compute each sample of a batch for itself and keep nothing.
_STOCK_PROCESSORS = (
    attention_processor.AttnProcessor,
    attention_processor.AttnProcessor2_0,
    attention_processor.SlicedAttnProcessor,
    attention_processor.XFormersAttnProcessor,
)
#: Arguments of a UNet whose meaning for each sample is known.
KNOWN_ARGUMENTS = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "return_dict",
}


def is_known(module: nn.Module) -> bool:
    """Whether a module computes what its class says: nobody else's hook, wrapper or kind of weight."""
    return (
        type(module).__module__.startswith(_KNOWN_ROOMS)
        and _forward_is_its_own(module)
        and hooks_are_ours(module)
        and not getattr(module, "parametrizations", None)
        and all(type(weight) in (nn.Parameter, WatchedParameter) for weight in own_weights(module))
        and _processor_is_known(module)
    )


def _forward_is_its_own(module: nn.Module) -> bool:
    """Whether nobody wraps a module's ``forward``; accelerate leaves the plain one there when it goes."""
    forward = vars(module).get("forward")
    return forward is None or forward == MethodType(class_of(module).forward, module)


def hooks_are_ours(module: nn.Module) -> bool:
    """Whether nobody else's hook sees or changes what a module is given and gives."""
    return all(isinstance(hook, Hook) for hook in hooks_of(module))


def all_known(modules: Iterable[nn.Module]) -> bool:
    """Whether all modules are known and in evaluation, and no hook is hung on every module there is."""
    parts = (part for module in modules for part in module.modules())
    return not _hooked_everywhere() and all(is_known(part) and not part.training for part in parts)


def _hooked_everywhere() -> bool:
    """Whether a hook of unknown purpose is hung on every module; torch's own (of counters) only look on."""
    hooks = [*all_modules._global_forward_hooks.values(), *all_modules._global_forward_pre_hooks.values()]
    owners = [type(getattr(hook, "__self__", hook)) for hook in hooks]
    return not all(owner.__module__.startswith("torch.utils.") for owner in owners)


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters, without those of modules inside it."""
    return [weight for weight in module._parameters.values() if weight is not None]


def _processor_is_known(module: Any) -> bool:
    return not hasattr(module, "processor") or type(module.processor) in _STOCK_PROCESSORS


def call_is_known(call: UNetCall) -> bool:
    """Whether all arguments of a UNet's call are understood, for samples that are alike in their timestep."""
    if any(value is not None and name not in KNOWN_ARGUMENTS for name, value in call.values.items()):
        return False
    down = call.values.get("down_block_additional_residuals")
    middle = call.values.get("mid_block_additional_residual")
    if down is not None and middle is None:
        return False  # a T2I-adapter's in their old form: they enter the encoder
    timestep, text = call.values["timestep"], call.text
    alike = not isinstance(timestep, Tensor) or timestep.numel() == 1
    fits = isinstance(text, Tensor) and text.ndim == 3 and len(text) == len(call.sample)
    return alike and fits and call.sample.ndim == 4


def computes_plainly(x: Tensor, *networks: nn.Module) -> bool:
    """Whether networks compute on ``x`` in evaluation, unrecorded, in the precision that they have."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
        or any(network.training for network in networks)
    )
