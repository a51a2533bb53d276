"""Backbones that a branch meets in training besides its own: plug-ins, blends and random changes of weights.

A branch that has seen one backbone alone, told "", answers that one. People draw with others. Here, in a
share of the steps, the backbone is a neighbour of itself: some of the pool's files at a drawn strength, and a
random low-rank change of its layers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.backbone import Backbone
from ...plugins import Plugins
from ...speed.stand_in import class_of

#: The kinds of plug-in that change the backbone's weights.
KINDS = ("checkpoint", "adapter")
#: The parts whose weights a pool changes.
PARTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class Member:
    """One file of a pool.

    Attributes:
        name: of the file.
        changes: (part, parameter) -> what it adds to the weight at strength 1.
        words: its trigger words, told in English while it is on.
    """

    name: str
    changes: Mapping[tuple[str, str], Tensor]
    words: str = ""


@dataclass(frozen=True)
class Variation:
    """How the backbone differs from itself in one step.

    Attributes:
        members: which files are on, and how strong.
        seed: of the random change; None without one.
        strength: of the random change, as a share of each weight's size.
    """

    members: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    strength: float = 0.0


class BackbonePool:
    """Draws neighbours of a backbone and exchanges its weights for theirs.

    Weights are exchanged whole and given back bit for bit. A file's changes are kept in memory, as large as
    the weights that it touches.

    Args:
        stock: the backbone, of whose networks none is trained.
        files: checkpoints and adapters (LoRA and its family) of the backbone's base: paths, or mappings of
            ``file`` and the ``words`` that the backbone is told in English while it is on.
        strength: bounds of the strengths of files.
        together: most files at once.
        rank: of the random change of each attention layer and convolution; 0 makes none.
        random_strength: its size at most, as a share of the weight's.
        share: of the steps in which the backbone is another; in the others it is itself.

    Raises:
        UserError: neither files nor random changes; a file that is none, of another base, or of a kind that
            does not change weights.
    """

    def __init__(
        self,
        stock: Backbone,
        files: Sequence[str | Path | Mapping[str, str]] = (),
        *,
        strength: tuple[float, float] = (0.5, 1.0),
        together: int = 2,
        rank: int = 0,
        random_strength: float = 0.3,
        share: float = 0.75,
    ) -> None:
        if not files and not rank:
            raise UserError(
                "recipe.pool has neither files nor random changes; give files, a rank above 0, or leave pool"
                " out"
            )
        self._stock, self._share, self._strength = stock, share, strength
        self._rank, self._random_strength, self._together = rank, random_strength, together
        named = [
            (file["file"], file.get("words", "")) if isinstance(file, Mapping) else (file, "")
            for file in files
        ]
        self.members = [_read_member(stock, Path(file), words) for file, words in named]
        self._base: dict[tuple[str, str], Tensor] = {}

    def draw(self, generator: torch.Generator) -> Variation | None:
        """The variation of a step; None leaves the backbone as it is."""
        chance = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        if chance.random() >= self._share:
            return None
        # A pool that has both uses one of them or both.
        kinds = [kind for kind, there in (("files", self.members), ("random", self._rank)) if there]
        chosen = chance.choice([kinds, *([kind] for kind in kinds)])
        members: list[int] = []
        if "files" in chosen:
            count = chance.randint(1, min(self._together, len(self.members)))
            members = chance.sample(range(len(self.members)), count)
        strengths = tuple((i, chance.uniform(*self._strength)) for i in members)
        if "random" not in chosen:
            return Variation(strengths)
        return Variation(strengths, chance.getrandbits(62), chance.uniform(0.0, self._random_strength))

    def words(self, variation: Variation | None) -> str:
        """What the backbone is told in English besides, while a variation is on."""
        chosen = variation.members if variation else ()
        return ", ".join(words for i, _ in chosen if (words := self.members[i].words))

    def changes_words(self, variation: Variation | None) -> bool:
        """Whether a variation changes the English text encoder."""
        chosen = variation.members if variation else ()
        return any(part == "text_encoder" for i, _ in chosen for part, _ in self.members[i].changes)

    @torch.no_grad()
    def put(self, variation: Variation | None) -> None:
        """Exchange the backbone's weights for a variation's; None gives it its own back.

        A variation must stay until the backward pass of whatever was computed with it is done.
        """
        self.lift()
        if variation is None:
            return
        changes: dict[tuple[str, str], Tensor] = {}
        for i, strength in variation.members:
            for place, change in self.members[i].changes.items():
                scaled = change.to(self._parameter(place).device) * strength
                changes[place] = changes[place] + scaled if place in changes else scaled
        if variation.seed is not None:
            for place, change in self._random_changes(variation.seed, variation.strength):
                changes[place] = changes[place] + change if place in changes else change
        for place, change in changes.items():
            parameter = self._parameter(place)
            self._base[place] = parameter.data
            parameter.data = (parameter.data + change).to(parameter.dtype)

    def lift(self) -> None:
        """Give the backbone its own weights back."""
        for place, weight in self._base.items():
            self._parameter(place).data = weight
        self._base = {}

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The backbone as it is of itself, inside the ``with`` block."""
        on = {place: self._parameter(place).data for place in self._base}
        base, self._base = self._base, {}
        for place, weight in base.items():
            self._parameter(place).data = weight
        try:
            yield
        finally:
            for place, weight in on.items():
                self._parameter(place).data = weight
            self._base = base

    def _parameter(self, place: tuple[str, str]) -> nn.Parameter:
        part, name = place
        return getattr(self._stock, part).get_parameter(name)

    def _random_changes(self, seed: int, strength: float) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Low-rank changes whose size is ``strength`` times the weight's root mean square."""
        generator = torch.Generator().manual_seed(seed)
        for name, module in self._stock.unet.named_modules():
            inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
            if not inside or class_of(module) not in (nn.Linear, nn.Conv2d):
                continue
            weight = module.weight
            rows, columns = weight.shape[0], weight[0].numel()
            rank = min(self._rank, rows, columns)
            up = torch.randn(rows, rank, generator=generator).to(weight.device)
            down = torch.randn(rank, columns, generator=generator).to(weight.device)
            size = strength * float(weight.float().square().mean().sqrt()) / rank**0.5
            yield ("unet", f"{name}.weight"), (up @ down * size).view(weight.shape)


def _read_member(stock: Backbone, file: Path, words: str) -> Member:
    """A file as what it adds to weights: it is attached as for drawing, looked at, and detached."""
    plugins = Plugins(stock)
    before = {
        (part, name): parameter.data
        for part in PARTS
        if getattr(stock, part) is not None
        for name, parameter in getattr(stock, part).named_parameters()
    }
    plugin = plugins.attach(file)
    try:
        if plugin.kind not in KINDS:
            raise UserError(
                f"{file} is a plug-in of the kind {plugin.kind}; a pool takes those that change the"
                f" backbone's weights: {', '.join(KINDS)}"
            )
        changes = {}
        for (part, name), weight in before.items():
            now = getattr(stock, part).get_parameter(name).data
            if now is not weight and now.shape == weight.shape and not torch.equal(now, weight):
                changes[part, name] = (now.float() - weight.float()).to(weight.dtype)
    finally:
        plugins.clear()
    return Member(plugin.name, changes, words)
