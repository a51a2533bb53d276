"""Tiny runs for tests/parallel, by whatever processes start them: KIND FOLDER OUT OPTIONS (JSON)."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from linear_run import Noise
from tiny import make_branch
from tiny_recipes import fresh
from torch import nn

from bdm.config import RunConfig
from bdm.data.batch import fixed_batch
from bdm.emoji.world import EmojiSource, World
from bdm.text.native import NativeTextEncoder
from bdm.training.loop import train
from bdm.training.places import LocalPlace
from bdm.training.recipes.base import Recipe
from bdm.training.recipes.branch import branch_recipe
from bdm.training.recipes.denoising import DenoisingRecipe
from bdm.training.recipes.latents import draw_latents
from bdm.training.recipes.native_text import native_text_recipe
from bdm.training.recipes.text_slot import TextSlotDenoiser


class Recording:
    """Writes down which examples this process sees, batch by batch; in one of them a signal stops the run."""

    log: Path
    stop, calls = 0, 0

    def forward(self, batch):
        if self.training:
            self.calls += 1
            if self.calls == self.stop and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(batch.indices) + "\n")
        return super().forward(batch)


class Blocks(nn.Module):
    """Built as UNets are: blocks that are split one by one, and weights outside of them."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = x + block(x).tanh()
        return x


class TinyRecipe(Recipe):
    """Learns to give back its input, noised."""

    def __init__(self):
        super().__init__(Noise(10))
        torch.manual_seed(0)
        self.blocks = Blocks()

    def parts(self):
        return {"blocks": self.blocks}

    def forward(self, batch):
        x = batch.pixels / 255
        return {"loss": (self.blocks(x + 0.1 * batch.randn(3, 8, 8))[:, :3] - x).square().mean()}

    def save(self, folder):
        folder.mkdir(parents=True)
        assert type(self.blocks) is Blocks
        torch.save(self.blocks.state_dict(), folder / "weights.pt")


class RecordingTinyRecipe(Recording, TinyRecipe):
    pass


class RecordingBranchRecipe(Recording, DenoisingRecipe):
    """One figure of validation; its weights are saved as they are read from the finished branch."""

    @torch.no_grad()
    def validate(self):
        batch = fixed_batch(self.source.validation, 4, self.seed)
        told = self._tell(batch, batch.captions)
        x_0, t = draw_latents(self.vae, batch), torch.full((4,), 500)
        return {"t500": self.loss.error(told, x_0, t, batch).mean().item()}

    def save(self, folder):
        super().save(folder)
        torch.save(self.read(folder), folder / "weights.pt")

    def read(self, folder):
        if not isinstance(self.denoiser, TextSlotDenoiser):
            return self.denoiser.branch.from_pretrained(folder).state_dict()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        text = NativeTextEncoder.from_pretrained(folder / "native_text_encoder")
        return {**unet.state_dict(), **text.state_dict()}


def fill_disk() -> None:
    """No room from the second state on."""
    plain = LocalPlace.put

    def put(self, name, content):
        if name > "step-00000003":
            raise OSError(28, "No space left on device")
        return plain(self, name, content)

    LocalPlace.put = put


def main(kind: str, folder: Path, out: Path, **options) -> None:
    """Six steps of 4 samples; ``stop=n`` sends SIGTERM to one process in batch n.

    Options are the optimizer's but for those of ``run_options``; with ``refuse=r`` process r has no room for
    the second state.
    """
    torch.set_num_threads(1)
    stop = options.pop("stop", 0)
    own = {name: options.pop(name) for name in options.pop("run_options", ())}
    if own.pop("refuse", None) == int(os.environ.get("RANK", "0")):
        fill_disk()
    parts = dict(backbone=str(folder / "backbone"), native_text_encoder=str(folder / "native"))
    optimizer = dict(
        steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=1, ema_decay=0.5, schedule="constant"
    )
    run = RunConfig(
        out=out, seed=3, log_every=1, validate_every=6, grid_every=2, trackers=(),
        recipe=dict(kind="branch", **parts), data=dict(kind="emoji", limit=4), optimizer=optimizer | options,
        **{"checkpoint_every": 100} | own,
    )  # fmt: skip
    out.mkdir(exist_ok=True)
    if kind == "tiny":
        recipe = RecordingTinyRecipe()
    elif kind in ("stage_1", "stage_2"):
        source = EmojiSource(World(), limit=4, size=64)
        earlier = {"run": str(folder / "one"), "weights": "raw", "moments": True}
        own = (
            {"native_text_encoder": fresh(folder / "vocabulary")}
            if kind == "stage_1"
            else {"start": earlier, "train": ("text_encoder", "unet")}
        )
        recipe = native_text_recipe(source, parts["backbone"], seed=3, **own)
        recipe.__class__ = RecordingBranchRecipe
        recipe.grid = lambda: None
    else:
        source = EmojiSource(World(), limit=4, size=64)
        recipe = branch_recipe(source, **parts, seed=3, grid_prompts=("红灯笼",))
        recipe.__class__ = RecordingBranchRecipe
        torch.manual_seed(0)
        recipe.denoiser.branch.load_state_dict(make_branch(recipe.denoiser.unet).state_dict())
    recipe.log = out / f"seen-{stop}-{os.environ.get('RANK', '0')}.jsonl"
    recipe.stop = stop
    train(run, recipe)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), **json.loads(sys.argv[4]))
