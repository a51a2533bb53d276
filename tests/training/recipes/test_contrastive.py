import torch

from bdm.training.recipes.contrastive import contrastive_loss


def test_contrastive_loss_is_symmetric_infonce():
    similarity = torch.randn(3, 3)
    rows, columns = similarity.log_softmax(1).diagonal(), similarity.log_softmax(0).diagonal()
    expected = -(rows.mean() + columns.mean()) / 2
    torch.testing.assert_close(contrastive_loss(similarity, ["a", "b", "c"]), expected)
    same = torch.zeros(2, 2)
    torch.testing.assert_close(contrastive_loss(same, ["a", "a"]), torch.tensor(2.0).log())
