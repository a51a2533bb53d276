"""A small run that all tests of the training loop share: a linear layer, the emoji world, twelve steps."""

import torch
from torch import nn

from bdm.config import RunConfig
from bdm.data.source import Example
from bdm.emoji.world import EmojiSource, World
from bdm.training.loop import train
from bdm.training.recipes.base import Recipe


class Noise:
    """So many pictures of noise, which are their own validation."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return Example("", pixels=torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator))

    def caption(self, index):
        return ""

    @property
    def validation(self):
        return self


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
    optimizer = dict(steps=12, batch_size=4, learning_rate=0.05, warmup_steps=2, ema_decay=0.9) | changes.pop(
        "optimizer", {}
    )
    recipe, data = dict(kind="autoencoder", model={}), dict(kind="emoji", limit=2)
    frequent = dict(log_every=2, validate_every=4, grid_every=4, checkpoint_every=4, trackers=())
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


class DroppingRecipe(LinearRecipe):
    """Draws from torch's global generator, as dropout does."""

    def forward(self, batch):
        terms = super().forward(batch)
        return {"loss": terms["loss"] * (1 + torch.rand(()))}
