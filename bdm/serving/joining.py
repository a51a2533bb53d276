"""Which requests can be drawn together, and why others cannot."""

from __future__ import annotations

from typing import Any

from ..drawing.request import Request
from ..text.reader import read_prompt
from .adapters import without_adapters
from .controls import without_controls

#: Plug-ins that are in the weights or in the words, or networks of their own whose calls can be joined too.
_JOINED_KINDS = ("checkpoint", "vae", "adapter", "embedding", "controlnet")


def why_alone(request: Request) -> str:
    """Why a complete request is drawn alone; "" where its steps can be joined with others'.

    Everything that a drawing does between its calls of the networks, it does for itself: its sampler, its
    guidance, its branch's strength. So what matters is what else happens inside the networks.
    """
    for plugin in request.plugins:
        if plugin.kind not in _JOINED_KINDS:
            return f"{plugin.name}, of the kind {plugin.kind}, acts inside the networks' calls"
    if request.approximation.branch_every > 1 or request.approximation.deep_every > 1:
        return "branch_every and deep_every keep features of one drawing inside the networks"
    if request.beside:
        return "branches beside the model's own are called inside the UNet's call"
    if _changed_strengths(request):
        return "its prompt gives an adapter another strength than the request does"
    return ""


def house_of(request: Request) -> tuple[Any, ...]:
    """What drawings have in common that share the networks' calls: model, branch, precision and plug-ins.

    Strengths of adapters may differ where they can be added beside the layers (see
    ``bdm.serving.adapters``), and each has its own ControlNets among those of the batch (see
    ``bdm.serving.controls``).
    """
    plugins = without_controls(without_adapters(request.plugins))
    return request.model, request.branch, request.precision, plugins


def _changed_strengths(request: Request) -> bool:
    """Whether a prompt sets strengths for its own call, which would be all others' too."""
    if request.rules.emphasis != "a1111":
        return False
    known = {
        plugin.name: (plugin.strength, plugin.text_strength)
        for plugin in request.plugins
        if plugin.kind == "adapter"
    }
    native, english = (request.prompt, request.negative), (request.prompt_en, request.negative_en)
    named = [lora for text in native for lora in read_prompt(text, full_width=True).loras]
    named += [lora for text in english for lora in read_prompt(text, full_width=False).loras]
    return any(known.get(lora.name) != (lora.unet_strength, lora.text_strength) for lora in named)
