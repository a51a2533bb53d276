"""A route to a native language: a model, and how it is told native prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import RouteConfig
from ..emoji.words import COLOURS, GRAMMAR, Language
from ..emoji.world import COLOUR_NAMES, World
from ..method.condition import GUIDED
from ..models.backbone import load_backbone
from ..models.samplers import other_sampler
from ..pipeline import BridgePipeline
from ..plugins import Plugins
from ..text.english import encode_english
from ..text.native import NativeTextEncoder
from ..text.translate import TableTranslation, Translate, read_translation
from .trials import Trial, draw

#: Where native text goes: through a branch, in the place of English text, or to a translation.
Slot = Literal["branch", "text", "translation"]


@dataclass
class Route:
    """A model that is told native prompts.

    Attributes:
        name: of the route.
        title: as the table calls it.
        slot: where native text goes.
        pipe: the model's parts; a bilingual pipeline but for a translation.
        native: what reads native prompts; None for a translation.
        translate: None but for a translation.
        plugins: of the model.
        beginning: samples of the route's pre-training.
        model: the folder of what was trained.
    """

    name: str
    title: str
    slot: Slot
    pipe: Any
    native: NativeTextEncoder | None
    translate: Translate | None
    plugins: Any
    beginning: int
    model: Path

    def draw(
        self,
        trial: Trial,
        steps: int,
        guidance: float,
        batch: int,
        seed: int,
        control_images: Sequence[Image.Image] | None = None,
    ) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] of a trial; picture i uses seed + i."""
        if self.translate is None:
            return draw(self.pipe, trial, steps, guidance, batch, seed, control_images)
        pictures = []
        for start in tqdm(
            range(0, len(trial.native), batch), desc=f"{self.name}/{trial.name}", mininterval=2
        ):
            part = slice(start, start + batch)
            said = zip(self.translate(trial.native[part]), trial.english[part], strict=True)
            texts = [", ".join(filter(None, pair)) for pair in said]
            shown = None if control_images is None else list(control_images[part])
            pictures.append(self._draw(texts, steps, guidance, seed + start, shown))
        return torch.cat(pictures)

    def draw_english(self, trial: Trial, steps: int, guidance: float, batch: int, seed: int) -> Tensor:
        """The same for the trial's English prompts on the UNet alone, as stock pipelines draw them."""
        pictures = []
        for start in range(0, len(trial.english), batch):
            texts = trial.english[start : start + batch]
            pictures.append(self._draw(texts, steps, guidance, seed + start, None))
        return torch.cat(pictures)

    @torch.no_grad()
    def _draw(
        self, texts: Sequence[str], steps: int, guidance: float, seed: int, control_images: Any
    ) -> Tensor:
        """Pictures of English texts by the stock pipeline, with the plug-ins that are attached."""
        count, stock = len(texts), stock_pipeline(self.pipe)
        features = encode_english([*texts, *[""] * count], self.pipe.text_encoder, self.pipe.tokenizer)
        told, nothing = features.chunk(2)
        with self.plugins.during_call(
            control_images, steps=lambda: stock.scheduler.timesteps, samples=count, parts=lambda: GUIDED
        ):
            images = stock(
                prompt_embeds=told,
                negative_prompt_embeds=nothing,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
                output_type="pt",
            ).images
        return images * 2 - 1

    @contextmanager
    def attached(self, source: str, name: str | None, **settings: Any) -> Any:
        """With a plug-in attached."""
        plugin = self.plugins.attach(source, name, **settings)
        try:
            yield
        finally:
            self.plugins.detach(plugin.name)


def stock_pipeline(parts: Any) -> Any:
    """diffusers' pipeline of a model's parts."""
    from diffusers import StableDiffusionPipeline

    nothing: Any = None
    pipe: Any = StableDiffusionPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler, nothing, nothing,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_route(
    name: str, config: RouteConfig, world: World, language: Language, sampler: str | None
) -> Route:
    """Load a route.

    Raises:
        UserError: no such model, table or translation model.
    """
    translate = _translation(config.translate, world, language)
    parts: Any
    if translate is not None:
        parts = load_backbone(config.model)
        slot, native, plugins = "translation", None, Plugins(parts)
    else:
        others: Any = {"branch": config.branch, "native_text_encoder": config.native_text_encoder}
        others = {name: place for name, place in others.items() if place is not None}
        parts = BridgePipeline.from_pretrained(config.model, **others)
        parts.set_progress_bar_config(disable=True)
        slot = "text" if parts.branch is None else "branch"
        native, plugins = parts.native_text_encoder, parts.plugins
    if sampler:
        parts.scheduler = other_sampler(sampler, parts.scheduler)
    return Route(
        name, config.title or name, slot, parts, native, translate, plugins, config.pretraining,
        Path(config.branch or config.model),
    )  # fmt: skip


def _translation(source: str | None, world: World, language: Language) -> Translate | None:
    match source:
        case None:
            return None
        case "none":
            return list
        case "world":
            return world_translation(world, language)
    return read_translation(source)


def world_translation(world: World, language: Language) -> TableTranslation:
    """What a dictionary would say of the emoji world's captions: its things and backgrounds by name."""
    names = {
        concept.names[language]: concept.names["en"]
        for concept in world.concepts
        if language in concept.names
    }
    background, joiner = GRAMMAR[language]
    english, comma = GRAMMAR["en"]
    grounds = {
        background.format(COLOURS[colour][1][language]): english.format(COLOURS[colour][1]["en"])
        for colour in COLOUR_NAMES
    }
    return TableTranslation(names | grounds, {joiner: comma})
