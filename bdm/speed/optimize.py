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

from ..method.bridge import Bridge, NativeCondition
from ..models.backbone import decode_latents
from .folding import prepared_layers
from .packing import packable

#: Features of a prompt are about this long (Chinese CLIP's 52); preparation does not depend on it.
_LENGTH = 52


class Execution:
    """What was done to a pipeline's networks; printed, it says so.

    Attributes:
        lines: what was done, a line each.
        seconds: how long that took, with the guided step and the decoding that were run for it.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0
        self._stack = ExitStack()
        # Not later than the process ends, while its modules are still there.
        weakref.finalize(self, self._stack.close)

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"ready after {self.seconds:.1f} s"])

    def undo(self) -> None:
        """Everything is as it was before, bit for bit."""
        self._stack.close()
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
            else:
                self._prepare_cpu(pipe)
            _run_through(pipe, size, count)
        except BaseException:
            self.undo()
            raise
        self.seconds = time.perf_counter() - start

    def _prepare_cpu(self, pipe: Any) -> None:
        networks = (pipe.unet, pipe.branch, pipe.vae)
        layers = [layer for network in networks for layer in packable(network)]
        size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)  # pyright: ignore
        self._stack.enter_context(prepared_layers(*networks))
        if layers:
            self.lines.append(
                f"{len(layers)} layers ({size / 2**30:.2f} GiB) compute in the CPU's own layout"
            )
            self.lines.append("folded enlargements and their convolutions")
        else:
            self.lines.append("nothing to do: oneDNN packs single precision that is not offloaded")

    def _prepare_cuda(self, pipe: Any) -> None:
        for network in (pipe.unet, pipe.branch, pipe.vae):
            network.to(memory_format=torch.channels_last)
            self._stack.callback(network.to, memory_format=torch.contiguous_format)
        self.lines.append("moved channels last")
        blocks = [block for network in (pipe.unet, pipe.branch) for block in compilable(network)]
        for block in blocks:
            block.compile(dynamic=False)
            self._stack.callback(setattr, block, "_compiled_call_impl", None)
        self.lines.append(
            f"compiled {len(blocks)} blocks, equal ones once (torch keeps the result between runs)"
        )


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
    like = dict(device=pipe._execution_device, dtype=unet.dtype)
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
