"""English captions -> the vectors of a word (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.source import Source
from ...models.backbone import Backbone
from ...text.english import trigger_tokens
from .captions import EnglishCaptions
from .community import community_recipe, load_stock
from .denoising import Denoiser, DenoisingRecipe
from .preview import StockPreview


class EmbeddingDenoiser(Denoiser):
    """A word's vectors learn, in a frozen backbone.

    Args:
        stock: the backbone; its tokenizer learns the word, its table of vectors gets places for them.
        trigger: the word.
        vectors: how many it stands for.
        initial: word whose token they start as.
        seed: of their differences at the start.
    """

    def __init__(
        self, stock: Backbone, trigger: str, vectors: int = 2, initial: str = "background", seed: int = 0
    ) -> None:
        from tokenizers import AddedToken

        captions = EnglishCaptions(stock.text_encoder, stock.tokenizer, trigger)
        super().__init__(stock.unet, captions, StockPreview(stock, captions))
        self.text_encoder = stock.text_encoder
        table: Any = stock.text_encoder.get_input_embeddings()
        start = table.weight[stock.tokenizer(initial, add_special_tokens=False).input_ids[0]].detach()
        generator = torch.Generator().manual_seed(seed)
        rows = start.expand(vectors, -1) + 0.01 * torch.randn(vectors, len(start), generator=generator)
        self.vectors = nn.ParameterDict({"rows": nn.Parameter(rows)})
        tokens: Any = [AddedToken(token, normalized=False) for token in trigger_tokens(trigger, vectors)]
        stock.tokenizer.add_tokens(tokens)
        self._known = len(table.weight)
        table.register_forward_hook(self._insert)
        # The lookup itself stays inside the table; the rows are put in by the hook.
        table.weight = nn.Parameter(
            torch.cat([table.weight.detach(), torch.zeros_like(rows)]), requires_grad=False
        )

    def _insert(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = inputs[0] - self._known
        return torch.where((own >= 0)[..., None], self.vectors["rows"][own.clamp(min=0)], output)

    def parts(self) -> dict[str, nn.Module]:
        return {"vectors": self.vectors}

    def save(self, folder: Path) -> None:
        """Write ``TRIGGER.pt`` as A1111 does."""
        folder.mkdir(parents=True, exist_ok=True)
        trigger = self.captions.dropped
        content = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": self.vectors["rows"].detach().clone()},
            "name": trigger,
            "step": 0,
        }
        torch.save(content, folder / f"{trigger}.pt")


def embedding_recipe(
    source: Source,
    backbone: str | Backbone,
    *,
    trigger: str = "mood",
    vectors: int = 2,
    initial: str = "background",
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Learn a word on a backbone (see ``EmbeddingDenoiser`` and ``community_recipe``)."""
    stock = load_stock(backbone)
    denoiser = EmbeddingDenoiser(stock, trigger, vectors, initial, seed)
    return community_recipe(source, backbone, stock, denoiser, seed=seed, **rest)
