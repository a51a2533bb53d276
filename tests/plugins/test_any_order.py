"""Bridge, ControlNet, peft's LoRA, offload and optimize() come and go in any order, bit for bit."""

import random
from itertools import permutations

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig
from tiny import NATIVE_DIM, TEXT_DIM

from bdm import Bridge, NativeCondition


class Put:
    """The things that can be on a pipeline's UNet; each is put on and taken off by its name."""

    def __init__(self, pipe, files):
        self.pipe, self.files = pipe, files
        self.bridge = Bridge(pipe.branch)
        self.optimized = None

    def on(self, name):
        unet = self.pipe.unet
        match name:
            case "bridge":
                self.bridge.attach(unet)
            case "ControlNet":
                self.pipe.plugins.attach(self.files["edges"], "edges")
            case "offload":
                cpu_offload_with_hook(unet, torch.device("cpu"))
            case "peft":
                torch.manual_seed(3)
                config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
                unet.add_adapter(config, adapter_name="lora")
                unet.requires_grad_(False)
            case "optimize":
                self.optimized = self.pipe.optimize()

    def off(self, name):
        match name:
            case "bridge":
                self.bridge.detach()
            case "ControlNet":
                self.pipe.plugins.detach("edges")
            case "offload":
                remove_hook_from_module(self.pipe.unet)
            case "peft":
                self.pipe.unet.delete_adapters("lora")
                self.pipe.unet.unload_lora()
            case "optimize":
                self.optimized.undo()


def outputs(put):
    """What the UNet gives: bare, and under the bridge's condition where it is attached."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, TEXT_DIM, generator=generator)
    native = torch.randn(2, 1, 9, NATIVE_DIM, generator=generator)
    with torch.no_grad():
        bare = put.pipe.unet(x, 300, text).sample
        with put.bridge.condition(NativeCondition(native[0], native[1])):
            return bare, put.pipe.unet(x, 300, text).sample


THINGS = ("bridge", "ControlNet", "offload", "peft")
#: Every order of putting on, each with another order of taking off; a fixed choice of all 576 pairs.
ORDERS = list(zip(permutations(THINGS), random.Random(1).sample(list(permutations(THINGS)), 24), strict=True))


@pytest.mark.parametrize(("on", "off"), ORDERS, ids=str)
def test_all_comes_off_bit_for_bit(pipe, files, on, off):
    put = Put(pipe, files)
    plain = outputs(put)[0]
    for name in on:
        put.on(name)
        bare, conditioned = outputs(put)
        assert torch.equal(bare, conditioned) != (put.bridge.unet is not None), name
    everything = outputs(put)[1]
    put.off("bridge")
    put.on("bridge")
    torch.testing.assert_close(outputs(put)[1], everything, rtol=0, atol=1e-5)
    for name in off:
        put.off(name)
        bare, conditioned = outputs(put)
        assert torch.equal(bare, conditioned) != (put.bridge.unet is not None), name
    assert torch.equal(outputs(put)[0], plain)
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("other", ["bridge", "ControlNet", "offload", "peft"])
@pytest.mark.parametrize("optimized_first", [True, False])
@pytest.mark.parametrize("undone_first", [True, False])
def test_with_optimize(pipe, files, other, optimized_first, undone_first):
    put = Put(pipe, files)
    plain = outputs(put)[0]
    # optimize() draws with a bridge of its own, so that one must be off.
    pair = ["optimize", other] if optimized_first or other == "bridge" else [other, "optimize"]
    for name in pair:
        put.on(name)
    outputs(put)
    for name in ("optimize", other) if undone_first else (other, "optimize"):
        put.off(name)
    assert torch.equal(outputs(put)[0], plain)
    assert all(type(weight) is torch.nn.Parameter for weight in pipe.unet.parameters())
