"""English captions -> a LoRA (arXiv 2106.09685) under kohya's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...data.source import Source
from ...formats.names import flat
from ...models.backbone import Backbone
from .captions import EnglishCaptions
from .community import community_recipe, load_stock
from .denoising import Denoiser, DenoisingRecipe
from .preview import StockPreview

#: The UNet's layers that get factors: attention, its feed-forward layers, and the convolutions between.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
]


class LoraDenoiser(Denoiser):
    """Low-rank changes of a frozen UNet learn, by peft.

    Args:
        stock: the backbone.
        rank: of the factors.
        alpha: the change is scaled by alpha / rank.
        trigger: see ``EnglishCaptions``.
        seed: of the factors.
        preview: further arguments of ``StockPreview``.
    """

    def __init__(
        self,
        stock: Backbone,
        *,
        rank: int = 8,
        alpha: int = 8,
        trigger: str = "",
        seed: int = 0,
        **preview: Any,
    ) -> None:
        from peft import LoraConfig

        captions = EnglishCaptions(stock.text_encoder, stock.tokenizer, trigger)
        super().__init__(stock.unet, captions, StockPreview(stock, captions, **preview))
        self.text_encoder = stock.text_encoder
        self.rank, self.alpha = rank, alpha
        torch.manual_seed(seed)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))

    def parts(self) -> dict[str, nn.Module]:
        return {
            name.replace(".", "_"): module
            for name, module in self.unet.named_modules()
            if name.endswith((".lora_A", ".lora_B"))
        }

    def predict_without(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the backbone alone predicts."""
        self.unet.disable_adapters()
        try:
            return self.predict(x_t, t, text)
        finally:
            self.unet.enable_adapters()

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` with the header that kohya's trainer writes."""
        tensors = {}
        for name, module in self.unet.named_modules():
            if not name.endswith(".lora_A"):
                continue
            owner = name.removesuffix(".lora_A")
            up = self.unet.get_submodule(f"{owner}.lora_B")
            key = f"lora_unet_{flat(owner)}"
            tensors[f"{key}.lora_down.weight"] = module.default.weight.half().contiguous()
            tensors[f"{key}.lora_up.weight"] = up.default.weight.half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha))
        noted = {
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "modelspec.trigger_phrase": self.captions.dropped,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt", **noted})


def lora_recipe(
    source: Source,
    backbone: str | Backbone,
    *,
    rank: int = 8,
    alpha: int = 8,
    trigger: str = "",
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Train a LoRA on a backbone (see ``LoraDenoiser`` and ``community_recipe``)."""
    stock = load_stock(backbone)
    denoiser = LoraDenoiser(stock, rank=rank, alpha=alpha, trigger=trigger, seed=seed)
    return community_recipe(source, backbone, stock, denoiser, seed=seed, **rest)
