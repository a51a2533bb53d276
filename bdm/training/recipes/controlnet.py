"""English captions and edges of the pictures -> a ControlNet (arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.source import Source, UnreadableExample
from ...errors import UserError
from ...models.backbone import Backbone
from ...plugins.controlnet import canny_edges, control_tensor
from .captions import EnglishCaptions
from .community import community_recipe, load_stock
from .denoising import Denoiser, DenoisingRecipe
from .preview import StockPreview


class EdgePreview:
    """Draws with a ControlNet, from the edges of held-out pictures: those of the prompt's, or of any."""

    def __init__(self, stock: StockPreview, controlnet: Any) -> None:
        self._stock, self._controlnet = stock, controlnet

    def draw(self, prompts: Sequence[str], guidance: float, seed: int, held_out: Source) -> Tensor:
        """See ``Preview``."""
        chosen = {}
        for i in range(len(held_out)):
            with suppress(UnreadableExample):
                chosen[held_out.caption(i)] = i
        pixels = [_usable_picture(held_out, chosen.get(prompt, i)) for i, prompt in enumerate(prompts)]
        edges = edge_tensor(pixels)
        return self._stock.draw(prompts, guidance, seed, held_out, controlnet=self._controlnet, image=edges)


class ControlNetDenoiser(Denoiser):
    """A ControlNet learns what Canny edges of a picture say of it.

    Args:
        stock: the backbone.
        widths: channels of the condition path; each step but the first halves the picture's side.
        trigger: see ``EnglishCaptions``.
        seed: of the weights that are new.
    """

    def __init__(
        self,
        stock: Backbone,
        widths: tuple[int, ...] = (16, 32, 96),
        trigger: str = "",
        seed: int = 0,
    ) -> None:
        from diffusers import ControlNetModel

        captions = EnglishCaptions(stock.text_encoder, stock.tokenizer, trigger)
        torch.manual_seed(seed)
        controlnet: Any = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=widths)
        super().__init__(stock.unet, captions, EdgePreview(StockPreview(stock, captions), controlnet))
        self.text_encoder, self.controlnet = stock.text_encoder, controlnet

    def parts(self) -> dict[str, nn.Module]:
        return {"controlnet": self.controlnet}

    def recomputable(self) -> dict[str, Any]:
        return {"controlnet": self.controlnet, "decoder": self.unet}

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """The edges of a batch's pictures."""
        assert batch.pixels is not None, "edges need pictures: set cache: false"
        return {"edges": edge_tensor(batch.pixels).to(self.controlnet.device)}

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, **given: Tensor) -> Tensor:
        down, middle = self.controlnet(x_t, t, text, given["edges"], return_dict=False)
        return self.unet(
            x_t, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    def save(self, folder: Path) -> None:
        """Write a diffusers folder; ``bdm convert --layout original`` makes a single file of it."""
        self.controlnet.save_pretrained(folder)


def _usable_picture(source: Source, index: int) -> Tensor:
    """(3, H, W) uint8 of example ``index``, or of the next one that can be used."""
    for i in range(len(source)):
        with suppress(UnreadableExample):
            pixels = source[(index + i) % len(source)].pixels
            assert pixels is not None
            return pixels
    raise UserError(f"none of {len(source)} validation pictures can be used; look at the data or its filters")


def edge_tensor(pixels: Sequence[Tensor] | Tensor) -> Tensor:
    """Canny edges of N pictures (3, H, W) uint8 as (N, 3, H, W) in [0, 1]."""
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    return control_tensor([canny_edges(picture) for picture in pictures])


def controlnet_recipe(
    source: Source,
    backbone: str | Backbone,
    *,
    widths: tuple[int, ...] = (16, 32, 96),
    trigger: str = "",
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Train a ControlNet on a backbone (see ``ControlNetDenoiser`` and ``community_recipe``)."""
    stock = load_stock(backbone)
    denoiser = ControlNetDenoiser(stock, widths, trigger, seed)
    return community_recipe(source, backbone, stock, denoiser, seed=seed, **rest)
