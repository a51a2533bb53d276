"""Networks made ready, once for all calls to come, for the machine they run on."""

from __future__ import annotations

import time
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..method.bridge import Bridge
from ..method.condition import NativeCondition
from ..models.backbone import decode_latents
from .folding import fold_layers
from .kernels import packed_kernels_work
from .packing import PackedLayer, pack_layers

#: Features of a prompt are about this long (Chinese CLIP's 52); preparation does not depend on it.
_LENGTH = 52


class Optimized:
    """What was done to a pipeline's networks; printed, it says so.

    Attributes:
        lines: what was done, a line each.
        seconds: how long that took, with the guided step and the decoding that were run for it.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0
        self._packed: list[PackedLayer] = []
        self._stack = ExitStack()
        # Not later than the process ends, while its modules are still there.
        weakref.finalize(self, self._stack.close)

    def __str__(self) -> str:
        lines = [*self.lines, f"ready after {self.seconds:.1f} s"]
        if plain := len(self._packed) - self.packed:
            lines.append(f"{plain} of the layers were asked for their weights; optimize() packs them again")
        return "\n".join(lines)

    @property
    def packed(self) -> int:
        """Layers whose weights are packed now; whoever asks for a weight makes them fewer."""
        return sum(layer.is_packed for layer in self._packed)

    def undo(self) -> None:
        """Everything is as it was before, bit for bit."""
        self._stack.close()
        self._packed = []
        self.lines = ["undone"]

    def prepare(self, pipe: Any, size: tuple[int, int], count: int) -> None:
        """Prepare for ``count`` pictures of this size (height and width in latents) and run through a guided
        step of them.

        If that fails, nothing has been done.
        """
        start = time.perf_counter()
        try:
            if pipe.unet.device.type == "cuda":
                self._prepare_cuda(pipe)
                _run_through(pipe, size, count)
            else:
                self._prepare_cpu(pipe)
                _run_through(pipe, size, count)
                self._say_what_is_packed()
        except BaseException:
            self.undo()
            raise
        self.seconds = time.perf_counter() - start

    def _prepare_cpu(self, pipe: Any) -> None:
        for network in _networks(pipe):
            self._packed += pack_layers(self._stack, network)
            fold_layers(self._stack, network, pack=True)

    def _say_what_is_packed(self) -> None:
        packed = [layer for layer in self._packed if layer.is_packed]
        self._packed = packed
        if packed:
            size = sum(layer.bytes for layer in packed) / 2**30
            self.lines.append(f"{len(packed)} layers ({size:.2f} GiB) compute in the CPU's own layout")
        elif packed_kernels_work():
            self.lines.append("nothing to do: oneDNN packs single precision that nothing else is on")
        else:
            self.lines.append("nothing to do: this torch has not the kernels for packed weights")

    def _prepare_cuda(self, pipe: Any) -> None:
        for network in _networks(pipe):
            network.to(memory_format=torch.channels_last)
            self._stack.callback(network.to, memory_format=torch.contiguous_format)
        self.lines.append("moved channels last")
        blocks = [block for network in _networks(pipe)[:-1] for block in compilable(network)]
        for block in blocks:
            block.compile(dynamic=False)
            self._stack.callback(setattr, block, "_compiled_call_impl", None)
        self.lines.append(
            f"compiled {len(blocks)} blocks, equal ones once (torch keeps the result between runs)"
        )


def _networks(pipe: Any) -> list[Any]:
    """The UNet, the branch where there is one, and the VAE."""
    return [pipe.unet, *([] if pipe.branch is None else [pipe.branch]), pipe.vae]


def compilable(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks within which nothing is hooked.

    Residual blocks, self-attentions and feed-forward networks.
    """
    found: list[Any] = []
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            found.append(module)
        elif isinstance(module, BasicTransformerBlock):
            found += [module.attn1, module.ff]
    return found


@torch.no_grad()
def _run_through(pipe: Any, size: tuple[int, int], count: int) -> None:
    """A guided step of both networks and the decoding of its result."""
    unet, branch = pipe.unet, pipe.branch
    like: dict[str, Any] = dict(device=pipe._execution_device, dtype=unet.dtype)
    if branch is None:
        text = torch.zeros(2 * count, 77, unet.config["cross_attention_dim"], **like)
        decode_latents(pipe.vae, unet(torch.zeros(2 * count, 4, *size, **like), 1, text).sample[:count])
        return
    native = torch.zeros(count, _LENGTH, branch.config["cross_attention_dim"], **like)
    english = torch.zeros(2 * count, 77, unet.config["cross_attention_dim"], **like)
    latents = torch.zeros(2 * count, 4, *size, **like)
    bridge = Bridge(branch).attach(unet)
    try:
        with bridge.condition(NativeCondition(native, native)):
            result = unet(latents, 1, english).sample
    finally:
        bridge.detach()
    decode_latents(pipe.vae, result[:count])
