"""A ControlNet's hook among those of others, and whatever may go wrong while it hangs."""

import copy
import gc
import pickle
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from community_files import make_controlnet
from peft import LoraConfig
from tiny import make_unet, make_vae

import bdm.plugins
from bdm.errors import UserError
from bdm.plugins import Plugins

PICTURE = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture
def host(pipe):
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return SimpleNamespace(**{part: getattr(pipe, part) for part in parts})


@pytest.fixture
def edges(pipe, tmp_path):
    make_controlnet(pipe.unet).save_pretrained(tmp_path / "edges")
    return tmp_path / "edges"


def predict(unet, timestep=7):
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=dice), timestep, torch.randn(2, 5, 32, generator=dice)
        ).sample


def hooks(module):
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


class Counting(ModelHook):
    """Accelerate's kind of hook, counting its calls."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def wrapped(unet):
    add_hook_to_module(unet, Counting())
    return lambda: remove_hook_from_module(unet)


def offloaded(unet):
    cpu_offload_with_hook(unet, "cpu")
    return lambda: remove_hook_from_module(unet)


def with_lora(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="stock")
    return lambda: unet.delete_adapters("stock")


def hooked(unet):
    return unet.register_forward_pre_hook(lambda module, args: None).remove


#: Each does something to a UNet and returns what undoes it.
OTHERS = {"accelerate": wrapped, "offload": offloaded, "peft": with_lora, "torch": hooked}


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("off_first", ["theirs", "ours"])
@pytest.mark.parametrize("other", OTHERS)
def test_hooks_of_others_and_ours_come_and_go_in_any_order(host, edges, other, first, off_first):
    plain, plugins = predict(host.unet), Plugins(host)
    plugins.attach(edges)
    with plugins.during_call(PICTURE):
        controlled = predict(host.unet)
    plugins.clear()
    steps = [lambda: plugins.attach(edges), lambda: OTHERS[other](host.unet)]
    done = [step() for step in (steps if first == "ours" else reversed(steps))]
    remove = done[1 if first == "ours" else 0]
    with plugins.during_call(PICTURE):
        torch.testing.assert_close(predict(host.unet), controlled)
    if off_first == "theirs":
        remove()
        with plugins.during_call(PICTURE):
            torch.testing.assert_close(predict(host.unet), controlled)
        plugins.clear()
    else:
        plugins.clear()
        torch.testing.assert_close(predict(host.unet), plain)
        remove()
    torch.testing.assert_close(predict(host.unet), plain)
    assert not hooks(host.unet)


def test_an_offload_hook_still_runs_after_detaching(host, edges):
    plugins = Plugins(host)
    plugins.attach(edges)
    counting = Counting()
    add_hook_to_module(host.unet, counting)
    predict(host.unet)
    plugins.detach("edges")
    predict(host.unet)
    assert counting.calls == 2


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_every_picture_of_an_offloaded_pipeline_is_controlled(pipe, edges, offloaded_first):
    if offloaded_first:
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.plugins.attach(edges)
    if not offloaded_first:
        pipe.enable_model_cpu_offload(device="cpu")
    settings = {"seed": 1, "num_inference_steps": 2, "output_type": "pt", "control_images": PICTURE}
    first, second = (pipe("龙", **settings).images for _ in range(2))
    assert torch.equal(first, second)
    pipe.plugins.set_strength("edges", 0.0)
    assert not torch.allclose(pipe("龙", **settings).images, first)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_while_drawing_leaves_no_condition(pipe, edges, error):
    def fail(*_):
        raise error

    plain = predict(pipe.unet)
    pipe.plugins.attach(edges, strength=0.5)
    settings = {"seed": 1, "num_inference_steps": 2, "output_type": "pt", "control_images": PICTURE}
    drawn = pipe("龙", **settings).images
    with pytest.raises(error):
        pipe("龙", **settings, callback_on_step_end=fail, plugin_strength={"edges": 2.0})
    handle = pipe.plugins._host.controlnets["edges"].controlnet.register_forward_hook(fail)
    with pytest.raises(error):
        pipe("龙", **settings)
    handle.remove()
    assert torch.equal(predict(pipe.unet), plain)
    assert pipe.plugins["edges"].strength["scale"] == 0.5
    assert torch.equal(pipe("龙", **settings).images, drawn)
    pipe.plugins.clear()
    assert not hooks(pipe.unet)


class Interrupt:
    """Interrupts at the n-th line run in the plug-ins' room, or in one function there, as Ctrl-C may."""

    def __init__(self, line, function=""):
        self.left, self.function = line, function

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(bdm.plugins.__path__[0]):
            return None
        if self.function not in ("", frame.f_code.co_name):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def run(self, function):
        sys.settrace(self)
        try:
            function()
        finally:
            sys.settrace(None)


@pytest.mark.parametrize("name", ["ink", "edges", "mood", pytest.param("style", marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_leaves_all_or_nothing(pipe, files, name):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    before = {id(p): p.data for part in parts for p in part.parameters()}

    def is_clean():
        same = all(torch.equal(p.data, before[id(p)]) for part in parts for p in part.parameters())
        return same and pipe.tokenizer is tokenizer and not hooks(pipe.unet) and not len(pipe.plugins)

    tokenizer, dice, interrupted = pipe.tokenizer, random.Random(name), 0
    counter = Interrupt(0)
    counter.run(lambda: pipe.plugins.attach(files[name]))
    lines = -counter.left
    counter = Interrupt(0)
    counter.run(lambda: pipe.plugins.detach(name))
    assert is_clean()
    for change, count in ((pipe.plugins.attach, lines), (pipe.plugins.detach, -counter.left)):
        for line in sorted(dice.sample(range(1, count), min(25, count - 1))):
            argument = files[name] if change == pipe.plugins.attach else name
            if change == pipe.plugins.detach:
                pipe.plugins.attach(files[name])
            try:
                Interrupt(line).run(lambda: change(argument))  # noqa: B023
            except KeyboardInterrupt:
                interrupted += 1
            if change == pipe.plugins.attach and name not in pipe.plugins:
                assert is_clean(), line
            pipe.plugins.clear()
            assert is_clean(), line
    assert interrupted > 20


def test_an_interrupt_while_weights_are_exchanged_puts_all_back(pipe, files):
    before = [p.data for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    counter = Interrupt(0, "_exchange")
    counter.run(lambda: pipe.plugins.attach(files["style"]))
    attached = [p.data for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    for line in range(-counter.left // 10, -counter.left, -counter.left // 10):
        with pytest.raises(KeyboardInterrupt):
            Interrupt(line, "_exchange").run(lambda: pipe.plugins.detach("style"))
        now = [p.data for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(now, attached, strict=True))
    pipe.plugins.detach("style")
    now = [p.data for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_a_copy_of_the_unet_is_not_controlled(host, edges):
    plain, plugins = predict(host.unet), Plugins(host)
    plugins.attach(edges)
    with plugins.during_call(PICTURE):
        copied, pickled = copy.deepcopy(host.unet), pickle.loads(pickle.dumps(host.unet))
        assert not torch.allclose(predict(host.unet), plain)
        assert torch.equal(predict(copied), plain)
        assert torch.equal(predict(pickled), plain)


def test_an_exchanged_unet_is_not_drawn_with_unseen(pipe, edges):
    pipe.plugins.attach(edges)
    pipe.vae = make_vae()
    old, pipe.unet = pipe.unet, make_unet()
    with pytest.raises(UserError, match="unet was exchanged"):
        pipe("龙", num_inference_steps=1, control_images=PICTURE)
    pipe.unet = old
    pipe("龙", num_inference_steps=1, control_images=PICTURE)
    pipe.unet = make_unet()
    pipe.plugins.detach("edges")
    assert not hooks(old)


def test_a_call_within_a_call_has_a_condition_of_its_own(host, edges):
    plugins = Plugins(host)
    plugins.attach(edges)
    with plugins.during_call(PICTURE):
        outer = predict(host.unet)
        with plugins.during_call(1 - PICTURE):
            assert not torch.allclose(predict(host.unet), outer)
        assert torch.equal(predict(host.unet), outer)


def test_a_dropped_pipeline_takes_its_controlnet_along(pipe, edges):
    dropped = SimpleNamespace(unet=pipe.unet)
    dropped.plugins = Plugins(dropped)
    dropped.plugins.attach(edges)
    assert hooks(pipe.unet)
    del dropped
    gc.collect()
    assert not hooks(pipe.unet)


@pytest.mark.parametrize("views", [1, 2])
def test_a_window_counts_steps_and_not_calls(host, edges, views):
    """Two views of a panorama are one step."""
    plugins = Plugins(host)
    plugins.attach(edges, start=0.5)
    timesteps, on = torch.tensor([900, 600, 300, 0]), []
    hook = plugins._host.controlnets["edges"].controlnet
    hook.register_forward_pre_hook(lambda module, args: on.append(int(args[1])))
    with plugins.during_call(PICTURE, steps=lambda: timesteps):
        for timestep in timesteps:
            for _ in range(views):
                predict(host.unet, timestep)
    assert on == [300] * views + [0] * views


def test_several_controlnets_add_up(host, edges):
    plugins = Plugins(host)
    plugins.attach(edges, "one", strength=0.3)
    plugins.attach(edges, "two", strength=0.5)
    with plugins.during_call({"one": PICTURE, "two": PICTURE}):
        both = predict(host.unet)
    plugins.detach("one")
    plugins.set_strength("two", 0.8)
    with plugins.during_call(PICTURE):
        torch.testing.assert_close(predict(host.unet), both)


def test_as_many_pictures_as_prompts(pipe, edges):
    pipe.plugins.attach(edges)
    two = torch.cat([PICTURE, 1 - PICTURE])
    pipe(["龙", "虎"], num_inference_steps=1, control_images=two)
    with pytest.raises(UserError, match="2 control pictures for another number of prompts"):
        pipe(["龙"] * 4, num_inference_steps=1, control_images=two)
