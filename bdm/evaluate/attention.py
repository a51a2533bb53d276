"""Whether a background's word looks at the background: attention maps against the emoji world's masks."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..emoji.drawings import compose, load_drawing
from ..emoji.words import COLOUR_NAMES, COLOURS
from ..emoji.world import World
from ..method.condition import NativeCondition
from ..pipeline.attention import Attention, record_attention
from ..pipeline.canvas import as_tensor
from ..speed.bridge import Bridge
from ..text.rules import OFFICIAL

#: At which shares of the noise schedule a picture is looked at.
TIMES = (0.2, 0.4, 0.6)


@dataclass(frozen=True)
class BackgroundAttention:
    """How well maps of words for backgrounds fit the backgrounds.

    Attributes:
        overlaps: IoU of each picture's map with its background.
        shuffled: the same with the map's places in a random order.
        things: IoU of the map of the thing's name with the background.
    """

    overlaps: tuple[float, ...]
    shuffled: tuple[float, ...]
    things: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"colour's word {_shown(self.overlaps)}, shuffled {_shown(self.shuffled)}, thing's name"
            f" {_shown(self.things)} ({len(self.overlaps)} pictures)"
        )


def _shown(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def overlap(attention: Tensor, mask: Tensor) -> float:
    """IoU of a mask with the places that a map looks at most, as many of them as the mask has.

    Args:
        attention: (h, w) map.
        mask: (h, w) bool, with some places and not all.
    """
    count = int(mask.sum())
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[attention.flatten().topk(count).indices] = True
    both = int((chosen & mask.flatten()).sum())
    return both / (2 * count - both)


def shuffled_overlap(attention: Tensor, mask: Tensor, seed: int, rounds: int = 8) -> float:
    """The same for a map whose places are in a random order; the mean of some."""
    generator = torch.Generator().manual_seed(seed)
    values = attention.flatten()
    return statistics.fmean(
        overlap(values[torch.randperm(len(values), generator=generator)].view_as(attention), mask)
        for _ in range(rounds)
    )


@torch.no_grad()
def background_attention(pipe: Any, world: World, count: int = 32, seed: int = 0) -> BackgroundAttention:
    """Look at the world's own pictures, whose backgrounds are known, with noise on them.

    Args:
        pipe: a bilingual pipeline of the emoji world, in Chinese.
        world: the world.
        count: pictures, of different things and colours.
        seed: of their choice and of the noise.
    """
    generator = random.Random(seed)
    native = [i for i, concept in enumerate(world.concepts) if concept.group != "shared"]
    overlaps, shuffled, things = [], [], []
    for i in range(count):
        index, colour = generator.choice(native), COLOUR_NAMES[i % len(COLOUR_NAMES)]
        concept = world.concepts[index]
        picture, mask = _drawn(pipe, load_drawing(concept.code, concept.look("zh")), colour, seed + i)
        name, word = concept.names["zh"], COLOURS[colour][1]["zh"]
        prompt = world.caption(index, colour, "zh")
        maps = maps_on(pipe, picture, prompt, seed + i).native_words(prompt, [word, name], OFFICIAL)
        overlaps.append(overlap(maps[word], mask))
        shuffled.append(shuffled_overlap(maps[word], mask, seed + i))
        things.append(overlap(maps[name], mask))
    return BackgroundAttention(tuple(overlaps), tuple(shuffled), tuple(things))


def maps_on(pipe: Any, picture: Image.Image, prompt: str, seed: int) -> Attention:
    """Attention while the networks look at a given picture with noise on it."""
    scheduler, encoder = pipe.scheduler, pipe.native_text_encoder
    pixels = as_tensor(picture.convert("RGB"))[None] * 2 - 1
    latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    english = pipe._encode_english([""], 1)
    bridge = Bridge(pipe.branch, share=False).attach(pipe.unet)
    try:
        with record_attention(pipe) as found, bridge.condition(NativeCondition(encoder.encode([prompt]))):
            for share in TIMES:
                t = torch.tensor([round(share * (scheduler.config.num_train_timesteps - 1))])
                noisy = scheduler.add_noise(latents, noise.to(latents), t)
                pipe.unet(noisy.to(pipe.unet.dtype), t, english)
    finally:
        bridge.detach()
    return found


def _drawn(pipe: Any, drawing: Image.Image, colour: str, seed: int) -> tuple[Image.Image, Tensor]:
    """A picture of the world, and where its background is, (h, w) of the latents."""
    latent = pipe.unet.config.sample_size
    size = latent * pipe.vae_scale_factor
    picture = compose(drawing, colour, size, random.Random(seed))
    black = Image.new("RGBA", drawing.size, (0, 0, 0, 255))
    black.putalpha(drawing.getchannel("A"))
    silhouette = compose(black, "white", size, random.Random(seed))
    share = interpolate(as_tensor(silhouette.convert("L"))[None], (latent, latent), mode="area")[0, 0]
    return picture, share > 0.5
