import torch
from torch import nn

from bdm.training.averaging import AveragedWeights


def test_average_is_the_recursion_and_applying_it_is_undone():
    layer = nn.Linear(2, 2)
    ema = AveragedWeights(list(layer.parameters()), decay=0.5)
    expected = layer.weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            layer.weight += torch.randn(2, 2)
        ema.step()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    own = layer.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight.detach(), own)
    again = AveragedWeights(list(layer.parameters()), decay=0.5)
    again.load_state_dict(ema.state_dict())
    assert again.steps == 29
    assert torch.equal(again.average[0], ema.average[0])
