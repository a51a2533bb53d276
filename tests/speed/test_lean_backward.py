"""The frozen backbone's backward pass: the same gradients from fewer kept tensors."""

import pytest
import torch
from tiny import NATIVE_DIM, make_branch, make_unet

from bdm.bench.compare import count_flops
from bdm.method.bridge import Bridge
from bdm.method.condition import NativeCondition
from bdm.speed import folding
from bdm.speed import lean_backward as room
from bdm.speed.lean_backward import lean_backward

#: Attends over the one position that is left of 8x8, so its softmax is 1 whatever query and key are.
ONE_POSITION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"


def kept_bytes(run, models):
    """Bytes that autograd keeps beside parameters while ``run`` works, each storage once; and its result."""
    # Asking for addresses would end the watch of weights that are folded.
    with torch._C.DisableTorchFunctionSubclass():
        storages, parameters = {}, {p.data_ptr() for model in models for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storages.values()), result


def gradients(unet, branch, autocast=False):
    generator = torch.Generator().manual_seed(3)
    latents, text, english = (
        torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 7, NATIVE_DIM), (2, 5, 32))
    )
    dtype = branch.dtype
    latents, text, english = latents.to(dtype), text.to(dtype), english.to(dtype)
    bridge = Bridge(branch).attach(unet)

    def loss():
        with bridge.condition(NativeCondition(text)), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return unet(latents, 7, english).sample.to(dtype).square().mean()

    try:
        size, value = kept_bytes(loss, (unet, branch))
        value.backward()
    finally:
        bridge.detach()
    found = {name: p.grad.clone() for name, p in branch.named_parameters()}
    branch.zero_grad(set_to_none=True)
    return size, value.detach(), found


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(room, "LEAST_VALUES", 0)


@pytest.fixture
def everything_folds(monkeypatch):
    monkeypatch.setattr(folding, "LEAST_FLOPS", 0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_same_gradients_from_less_memory(checkpointing):
    unet = make_unet().double()
    branch = make_branch(unet).requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    plain_size, plain_loss, plain = gradients(unet, branch)
    with lean_backward(unet):
        size, loss, found = gradients(unet, branch)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0 or name.startswith(ONE_POSITION)
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14)
    if not checkpointing:
        assert size < 0.8 * plain_size, size / plain_size
        assert gradients(unet, branch)[0] > 0.99 * plain_size, "nothing stays behind"


@pytest.mark.parametrize("change", ["", "checkpointing", "channels last"])
def test_folded_enlargements_give_the_same_gradients_from_less_work(everything_folds, change):
    unet = make_unet().double()
    branch = make_branch(unet).requires_grad_(True)
    if change == "checkpointing":
        unet.enable_gradient_checkpointing()
        unet.train()
    if change == "channels last":
        unet.to(memory_format=torch.channels_last)
        branch.to(memory_format=torch.channels_last)
    _, plain_loss, plain = gradients(unet, branch)
    plain_flops = count_flops(lambda: gradients(unet, branch))
    with lean_backward(unet):
        _, loss, found = gradients(unet, branch)
        flops = count_flops(lambda: gradients(unet, branch))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)
    assert flops < plain_flops


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_enlargement_that_trains_is_not_folded(everything_folds, name):
    unet = make_unet()
    branch = make_branch(unet).requires_grad_(True)
    trained = getattr(unet.up_blocks[0].upsamplers[0].conv, name).requires_grad_(True)
    with lean_backward(unet):
        gradients(unet, branch)
    assert trained.grad.abs().max() > 0


def test_under_autocast(everything_folds):
    unet = make_unet()
    branch = make_branch(unet).requires_grad_(True)
    _, plain_loss, plain = gradients(unet, branch, autocast=True)
    with lean_backward(unet):
        _, loss, found = gradients(unet, branch, autocast=True)
    assert torch.equal(loss, plain_loss)
    for name, gradient in plain.items():
        # Products in bfloat16 have 8 bits; sums may be rounded in another order.
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_layers_that_train_keep_their_gradients():
    """As under an adapter that trains a layer of the backbone."""
    unet = make_unet()
    branch = make_branch(unet).requires_grad_(True)
    trained = [unet.up_blocks[1].resnets[0].conv1.weight, unet.up_blocks[1].resnets[0].norm2.weight]
    for parameter in trained:
        parameter.requires_grad_(True)
    gradients(unet, branch)
    plain = [p.grad.clone() for p in trained]
    unet.zero_grad(set_to_none=True)
    with lean_backward(unet):
        gradients(unet, branch)
    for parameter, gradient in zip(trained, plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_small_inputs_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(room, "LEAST_VALUES", 10**6)
    unet = make_unet()
    branch = make_branch(unet).requires_grad_(True)
    plain_size, _, plain = gradients(unet, branch)
    with lean_backward(unet):
        size, _, found = gradients(unet, branch)
    assert size == plain_size
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
