import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bdm.config import RunConfig
from bdm.data.emoji import EmojiSource, World
from bdm.errors import UserError
from bdm.recipes.base import Recipe
from bdm.training import learning_rate, read_metrics, train


class LinearRecipe(Recipe):
    """A small recipe with randomness per sample: the loop must know nothing else."""

    def __init__(self):
        super().__init__(EmojiSource(World(), limit=2))
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.frozen = nn.Linear(3, 1)

    def parts(self):
        return {"layer": self.layer}

    def forward(self, batch):
        x = batch.pixels.float().mean((2, 3)) / 255 + 0.1 * batch.randn(3)
        return {"loss": (self.layer(x) - self.frozen(x)).square().mean()}

    def save(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.layer.state_dict(), folder / "layer.pt")


def config(out, **changes):
    optimizer = dict(steps=12, batch_size=4, learning_rate=0.05, warmup_steps=2, ema_decay=0.9) | changes.pop("optimizer", {})
    recipe, data = dict(kind="autoencoder", model={}), dict(kind="emoji", limit=2)
    frequent = dict(log_every=2, validate_every=4, grid_every=4, checkpoint_every=4)
    return RunConfig(out=out, recipe=recipe, data=data, optimizer=optimizer, **frequent | changes)


def run(out, recipe=None, **changes):
    out.mkdir(exist_ok=True)
    folder = train(config(out, **changes), recipe or LinearRecipe(), "python train.py")
    return torch.load(folder / "layer.pt", weights_only=True)


class Stop(Exception):
    pass


class StoppingRecipe(LinearRecipe):
    def forward(self, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.training and self.calls > 9:
            raise Stop
        return super().forward(batch)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe())
    assert not (tmp_path / "cut/model").exists()
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    for out in ("whole", "cut"):
        assert [row["step"] for row in read_metrics(tmp_path / out) if "loss" in row] == [2, 4, 6, 8, 10, 12]


def test_a_resume_between_two_log_rows_logs_a_mean(tmp_path):
    """The checkpoint at step 8 lies inside the row of steps 7 to 12, so the resumed row is the mean of steps 9 to 12."""
    run(tmp_path / "every", log_every=1)
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), log_every=6)
    run(tmp_path / "cut", log_every=6)
    single = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "every") if "loss" in row}
    rows = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "cut") if "loss" in row}
    assert rows[12] == pytest.approx(sum(single[i] for i in (9, 10, 11, 12)) / 4, rel=1e-4)


def test_accumulation_gives_the_same_weights(tmp_path):
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", optimizer=dict(accumulation=2))
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], atol=1e-6, rtol=1e-5)


def test_only_the_parts_train_and_the_run_folder_is_complete(tmp_path):
    recipe = LinearRecipe()
    before = {k: v.clone() for k, v in recipe.state_dict().items()}
    run(tmp_path, recipe)
    after = recipe.state_dict()
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["layer.weight"], after["layer.weight"])
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.jsonl", "loss.png", "state.pt", "model"}
    card = json.loads((tmp_path / "model/card.json").read_text())
    assert card["steps"] == 12
    assert card["command"] == "python train.py"
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert losses[-1] < losses[0]


def test_changed_configuration_and_damaged_state_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        run(tmp_path, optimizer=dict(learning_rate=0.01))
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path)


def test_learning_rate():
    optimizer = config(Path("x")).optimizer
    rates = [learning_rate(i, optimizer) for i in range(12)]
    assert rates[:3] == pytest.approx([0.025, 0.05, 0.05])
    assert rates[7] == pytest.approx(0.025)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
