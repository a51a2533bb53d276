"""Native captions -> a latent diffusion model that is told them in the text's place.

Two-stage training as of Japanese Stable Diffusion (stage 1: a fresh text encoder through the frozen latent
diffusion model; stage 2: both), Taiyi's and AltDiffusion's are choices of what is trained and where it
begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...data.source import Source
from ...errors import UserError
from ...models.backbone import Backbone, load_backbone
from ...text.native import NativeTextEncoder
from .captions import NativeCaptions
from .community import load_stock
from .denoising import DenoisingRecipe
from .native_encoder import Start, fresh_encoder, read_moments, take_weights
from .prepared import check_prepared
from .text_slot import PARTS, Attention, TextSlotDenoiser, TrainedPart, with_connector

#: A native text encoder, its folder, or arguments of ``fresh_encoder``.
Encoder = NativeTextEncoder | str | Mapping[str, Any]


def native_text_recipe(
    source: Source,
    backbone: str | Backbone,
    native_text_encoder: Encoder | None = None,
    start: str | Mapping[str, Any] | None = None,
    *,
    train: Sequence[TrainedPart] = ("text_encoder",),
    attention: Attention = "keys_values",
    connector: Mapping[str, Any] | None = None,
    shuffle_captions: bool = False,
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Train what reads native captions in the text's place, by denoising.

    Args:
        source: pictures with native captions.
        backbone: the latent diffusion model, or its folder, file or hub name. With ``start`` it is what the
            finished UNet is compared with.
        native_text_encoder: what reads the captions.
        start: an earlier run, or arguments of ``Start``: its model is gone on with.
        train: what is trained.
        attention: see ``TextSlotDenoiser``.
        connector: ``hidden`` and ``depth`` of a fresh connector (see ``Connector``) behind the text encoder.
        shuffle_captions: see ``NativeCaptions``.
        seed: seed of the run.
        rest: see ``DenoisingRecipe``.

    Raises:
        UserError: parts that do not fit, a UNet that would learn from an untrained text encoder, or data that
            were prepared with another text encoder than the one that is trained.
    """
    fresh = isinstance(native_text_encoder, Mapping)
    if fresh and {"unet", "cross_attention"} & set(train):
        raise UserError(
            f"recipe.train is {', '.join(train)} and the text encoder is untrained: the UNet would forget"
            " what it knows while that learns; train the text encoder alone first, and name that run as"
            " recipe.start"
        )
    denoiser, stock = text_slot(
        source, backbone, native_text_encoder, start, train, attention, connector, seed
    )
    if shuffle_captions:
        denoiser.captions = NativeCaptions(denoiser.native_text_encoder, source, seed)
    inherited = stock.scheduler.config["prediction_type"]
    return DenoisingRecipe(source, denoiser, stock.vae, inherited=inherited, seed=seed, **rest)


def text_slot(
    source: Source,
    backbone: str | Backbone,
    native_text_encoder: Encoder | None,
    start: str | Mapping[str, Any] | None,
    train: Sequence[TrainedPart],
    attention: Attention = "keys_values",
    connector: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[TextSlotDenoiser, Backbone]:
    """The denoiser of a route in the text slot, and its latent diffusion model.

    See ``native_text_recipe``.
    """
    if (native_text_encoder is None) == (start is None):
        raise UserError("give recipe.native_text_encoder or recipe.start, one of the two")
    begun = _start(start)
    stock = begun.stock() if begun else load_stock(backbone)
    if begun:
        named, native = str(begun.model), begun.native()
    else:
        assert native_text_encoder is not None
        named, native = open_encoder(native_text_encoder, stock, seed)
    if connector is not None:
        native = with_connector(native, stock.unet.config["cross_attention_dim"], seed=seed, **connector)
    learns = bool({"text_encoder", "connector"} & set(train))
    check_prepared(
        source, vae=(begun.model if begun else backbone, stock.vae), native=(named, native), trained=learns
    )
    before = _before(backbone, stock, train)
    state = begun.read_state() if begun else None
    denoiser = TextSlotDenoiser(
        stock,
        native,
        train,
        attention,
        before,
        read_moments(state, begun.run) if state and begun and begun.moments else None,
    )
    if state and begun and begun.weights == "raw":
        every = {name: module for part in PARTS for name, module in denoiser.part(part).items()}
        take_weights(state, every, begun.run)
    return denoiser, stock


def _start(start: str | Mapping[str, Any] | None) -> Start | None:
    if start is None:
        return None
    return Start(start) if isinstance(start, str) else Start(**start)


def open_encoder(encoder: Encoder, stock: Backbone, seed: int = 0) -> tuple[str, NativeTextEncoder]:
    """A native text encoder, and where it is from.

    Args:
        encoder: see ``Encoder``.
        stock: the model whose UNet is told its features: a fresh one is as wide as that reads.
        seed: of a fresh one's weights.
    """
    if isinstance(encoder, NativeTextEncoder):
        return "the given one", encoder
    if isinstance(encoder, Mapping):
        return "a fresh one", fresh_encoder(
            width=stock.unet.config["cross_attention_dim"], seed=seed, **encoder
        )
    return encoder, NativeTextEncoder.from_pretrained(encoder)


def _before(backbone: str | Backbone, stock: Backbone, train: Sequence[TrainedPart]) -> Any:
    """What gives the backbone's UNet weights when a trained UNet is compared with them.

    Raises:
        UserError: the UNet is another network than the backbone's.
    """
    if not {"unet", "cross_attention"} & set(train):
        return None
    own = _shapes(stock.unet.state_dict())
    if isinstance(backbone, Backbone):
        kept = {name: weight.detach().clone() for name, weight in backbone.unet.state_dict().items()}
        read = lambda: kept  # noqa: E731
    else:
        read = lambda: load_backbone(backbone, text_encoder=False).unet.state_dict()  # noqa: E731
    if _shapes(read()) != own:
        raise UserError(
            f"recipe.start's UNet has not the shape of the one in {backbone}; name the backbone that it began"
            " as"
        )
    return read


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: weight.shape for name, weight in weights.items()}
