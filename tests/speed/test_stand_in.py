"""Classes that stand in: whatever is put on and taken off in whatever order, the module's own remains."""

import copy
import pickle
import threading
from contextlib import ExitStack
from itertools import permutations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from bdm.method.hooks import Hook, hang_after, hang_before
from bdm.speed.stand_in import class_of, stand_in


def twice(module, plain, *args, **kwargs):
    return 2 * plain(module, *args, **kwargs)


@pytest.fixture
def layer():
    return nn.Linear(3, 3)


def test_it_computes_and_leaves_nothing(layer):
    x, before = torch.randn(2, 3), dict(vars(layer))
    plain = layer(x)
    with ExitStack() as stack:
        stand_in(stack, layer, twice)
        assert torch.equal(layer(x), 2 * plain)
        assert isinstance(layer, nn.Linear)
        assert class_of(layer) is nn.Linear
        with ExitStack() as inner:
            stand_in(inner, layer, twice)
            assert torch.equal(layer(x), 2 * plain), "one stands in at a time"
        assert torch.equal(layer(x), 2 * plain)
    assert torch.equal(layer(x), plain)
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == before.keys()


class Adding(ModelHook):
    """As accelerate's offload hooks, it wraps ``forward``."""

    def post_forward(self, module, output):
        return output + 1


@pytest.mark.parametrize("order", list(permutations(["stand-in", "hook", "wrapper"])), ids=str)
@pytest.mark.parametrize("end", list(permutations(["stand-in", "hook", "wrapper"])), ids=str)
def test_all_orders_with_hooks_and_wrappers_of_others(layer, order, end):
    x = torch.randn(2, 3)
    plain = layer(x)
    stacks = {name: ExitStack() for name in order}
    for name in order:
        if name == "stand-in":
            stand_in(stacks[name], layer, twice)
        elif name == "hook":
            hang_after(stacks[name], layer, lambda module, args, kwargs, output: output + 10)
        else:
            add_hook_to_module(layer, Adding())
            stacks[name].callback(remove_hook_from_module, layer)
    # A wrapper that came before is not wrapped: the stand-in's class is behind it.
    doubled = 2 * plain if order.index("stand-in") < order.index("wrapper") else plain
    torch.testing.assert_close(layer(x), doubled + 11)
    for name in end:
        stacks[name].close()
    assert torch.equal(layer(x), plain)
    assert type(layer) is nn.Linear
    assert not layer._forward_hooks


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_copies_and_pickles(layer, protocol):
    x = torch.randn(2, 3)
    plain = layer(x)
    with ExitStack() as stack:
        stand_in(stack, layer, twice)
        hang_before(stack, layer, lambda module, args, kwargs: ((args[0] + 1,), kwargs))
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer, protocol))]
    for other in others:
        assert type(other) is nn.Linear
        assert torch.equal(other(x), plain)
        assert all(isinstance(hook, Hook) for hook in other._forward_pre_hooks.values())


def test_two_threads_that_share_a_module(layer):
    x = torch.randn(2, 3)
    plain, stop, wrong = layer(x), threading.Event(), []

    def come_and_go():
        while not stop.is_set():
            with ExitStack() as stack:
                stand_in(stack, layer, lambda module, plain, given: plain(module, given))
                wrong.extend([1] * (not torch.equal(layer(x), plain_result)))

    plain_result = plain
    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert type(layer) is nn.Linear


def test_an_interrupt_leaves_nothing(layer):
    def interrupted():
        with ExitStack() as stack:
            stand_in(stack, layer, twice)
            hang_before(stack, layer, lambda *_: None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(layer) is nn.Linear
    assert not layer._forward_pre_hooks
