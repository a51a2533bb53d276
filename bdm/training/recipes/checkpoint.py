"""English captions -> a fine-tuned checkpoint, as the community makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ...data.source import Source
from ...formats.checkpoint import CONFIG_KEY, write_checkpoint
from ...formats.names import text_to_plain
from ...models.backbone import Backbone
from .captions import EnglishCaptions
from .community import community_recipe, load_stock
from .denoising import Denoiser, DenoisingRecipe
from .preview import StockPreview


class CheckpointDenoiser(Denoiser):
    """The whole UNet learns (DreamBooth without a trigger).

    Args:
        stock: the backbone.
        trigger: see ``EnglishCaptions``.
    """

    def __init__(self, stock: Backbone, trigger: str = "") -> None:
        captions = EnglishCaptions(stock.text_encoder, stock.tokenizer, trigger)
        super().__init__(stock.unet, captions, StockPreview(stock, captions))
        self.text_encoder = stock.text_encoder

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` in the original layout and half precision: UNet and text encoder,
        without VAE ("pruned").
        """
        weights = {
            "unet": self.unet.state_dict(),
            "text_encoder": text_to_plain(self.text_encoder.state_dict()),
        }
        tensors = {key: tensor.half().contiguous() for key, tensor in write_checkpoint(weights).items()}
        configs = {
            "unet": json.loads(self.unet.to_json_string()),
            "text_encoder": json.loads(self.text_encoder.config.to_json_string()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt", CONFIG_KEY: json.dumps(configs)})


def checkpoint_recipe(
    source: Source, backbone: str | Backbone, trigger: str = "", **rest: Any
) -> DenoisingRecipe:
    """Fine-tune a backbone's UNet (see ``community_recipe``)."""
    stock = load_stock(backbone)
    return community_recipe(source, backbone, stock, CheckpointDenoiser(stock, trigger), **rest)
