"""What the recipes of the English community's plug-ins share: a backbone alone, and English captions.

None of them knows of the branch or of a native language; they exist so that plug-ins of every kind can be
made and measured where nothing can be downloaded. They write the file forms that are shared on Civitai.
"""

from __future__ import annotations

from typing import Any

from ...data.source import Source
from ...models.backbone import Backbone, load_backbone
from .denoising import Denoiser, DenoisingRecipe
from .prepared import check_prepared


def load_stock(backbone: str | Backbone) -> Backbone:
    """A backbone, or the one in a folder, a single file or at a hub name."""
    return backbone if isinstance(backbone, Backbone) else load_backbone(backbone)


def community_recipe(
    source: Source, backbone: str | Backbone, stock: Backbone, denoiser: Denoiser, **rest: Any
) -> DenoisingRecipe:
    """A recipe of something on a backbone.

    Args:
        source: pictures with English captions.
        backbone: what the backbone was loaded from, for messages.
        stock: the backbone.
        denoiser: what learns on it.
        rest: see ``DenoisingRecipe``.
    """
    check_prepared(source, vae=(backbone, stock.vae))
    inherited = stock.scheduler.config["prediction_type"]
    return DenoisingRecipe(source, denoiser, stock.vae, inherited=inherited, **rest)
