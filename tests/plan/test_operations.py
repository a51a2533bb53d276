"""Operations are counted as they are known by hand, and what is not known is said."""

from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bdm.bench.compare import count_flops
from bdm.plan import operations
from bdm.plan.fake_device import FakeDevice, miscounted_in_plans
from bdm.plan.operations import CountedOperations, known_works, miscounted, miscounted_on


@pytest.fixture(autouse=True)
def _asked_anew():
    """What was found out is kept for the process; these tests change what there is to find."""
    kept = (operations._formula, miscounted_in_plans, miscounted_on)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_known_works_are_counted_once_whichever_way_attention_takes(backend):
    with sdpa_kernel(backend):
        assert miscounted_on("cpu") == ()
        assert miscounted_in_plans() == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_known_works_agree_with_pytorchs_counter(dtype):
    """With attention as the products it is made of, which that counter knows on every version."""
    for work in known_works():
        inputs = [torch.randn(shape, dtype=dtype) for shape in work.shapes]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work.run(*inputs)
        assert counter.get_total_flops() == work.forward
        with CountedOperations() as ours:
            work.run(*inputs)
        assert ours.total == work.forward


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_operators_that_are_made_of_others(guard):
    """In inference mode they come whole, and their parts are counted, once."""
    layer, q = nn.Linear(8, 8), torch.randn(2, 3, 5, 8)
    with guard(), CountedOperations() as counter:
        functional.scaled_dot_product_attention(layer(q), q, q)
        torch.einsum("bhld,bhsd->bhls", q, q)
    assert counter.total == 2 * (30 * 8 * 8) + 3 * (2 * 6 * 5 * 5 * 8)
    assert not counter.operations.uncounted


def test_attention_with_a_mask_and_with_fewer_heads_of_keys():
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16)
    with CountedOperations() as counter:
        functional.scaled_dot_product_attention(q, k, k, attn_mask=torch.zeros(7, 9))
    assert counter.total == 2 * 2 * 8 * 7 * 9 * 16


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_layers_packed_for_onednn():
    """Their operators have names of their own, and their weights shapes of blocks."""
    settings = ((1, 1), (1, 1), (1, 1), 1)
    onednn = torch.ops.mkldnn
    x, weight = torch.randn(1, 32, 16, 16), torch.randn(48, 32, 3, 3)
    kernel = onednn._reorder_convolution_weight(weight, *settings, list(x.shape))
    rows, matrix = torch.randn(20, 64), torch.randn(48, 64)
    packed = onednn._reorder_linear_weight(matrix, 20)
    end = ("none", [], "")
    with torch.no_grad():
        convolved = count_flops(lambda: onednn._convolution_pointwise(x, kernel, None, *settings, *end))
        multiplied = count_flops(lambda: onednn._linear_pointwise(rows, packed, None, *end))
    assert (convolved, multiplied) == (2 * 256 * 48 * 32 * 9, 2 * 20 * 48 * 64)


def test_an_operator_that_multiplies_and_is_not_known_is_named(caplog):
    def run():
        torch.mv(torch.ones(2, 3), torch.ones(3))
        nn.functional.interpolate(torch.ones(1, 1, 2, 2), scale_factor=2, mode="bilinear")

    with CountedOperations() as counter:
        run()
    assert counter.operations.uncounted == {"aten::mv"}
    assert count_flops(run) is None
    assert "aten::mv" in caplog.text


#: As if a later PyTorch had given it another name that says nothing.
RENAMED = {"attention": "_scaled_dot_product_", "convolution": "convolution", "linear layer": "mm"}


@pytest.mark.parametrize("name", RENAMED)
def test_work_that_goes_uncounted_is_found_by_its_known_sum(monkeypatch, name):
    real = operations._formula

    def unknown(operator):
        return None if RENAMED[name] in operator.name() else real(operator)

    monkeypatch.setattr(operations, "_formula", unknown)
    assert miscounted_on("cpu") == (name,)
    assert miscounted_in_plans() == (name,)
    assert count_flops(lambda: None) is None


def test_work_counted_twice_is_found_too():
    fake = FakeDevice()
    with fake:
        make = lambda shape: fake.blank(*shape)  # noqa: E731
        assert miscounted(make, fake.flops.total) == []
        assert miscounted(make, lambda: 2 * fake.flops.total()) == [
            "convolution",
            "linear layer",
            "attention",
        ]


def test_the_largest_convolution_is_that_of_the_known_work():
    work = next(known_works())
    fake = FakeDevice()
    with fake:
        result = work.run(*(fake.blank(*shape) for shape in work.shapes))
    assert fake.largest_convolution == 4 * (sum(map(prod, work.shapes)) + result.numel())
