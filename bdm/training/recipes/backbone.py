"""Captions -> a backbone of one's own: a small Stable Diffusion, English or native."""

from __future__ import annotations

import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...data.batch import Batch
from ...data.source import Source
from ...errors import UserError
from ...method.hooks import hang_before
from ...models.backbone import Backbone, load_backbone, load_clip_text, load_vae
from ...models.fingerprint import same_latents, vae_sketch
from ...models.noise_schedule import SD15_SCHEDULE, Prediction
from ...text.vocabulary import clip_tokenizer
from .captions import EnglishCaptions, NativeCaptions
from .denoising import Denoiser, DenoisingRecipe
from .native_text import Encoder, open_encoder
from .prepared import check_prepared
from .preview import StockPreview
from .text_slot import TextSlotDenoiser


class BackboneDenoiser(Denoiser):
    """A UNet that learns beside a frozen VAE and text encoder.

    A branch speaks through the skips alone, while the decoder hears "". SD1.5's decoder follows them, as
    ControlNet shows; a small one may leave the text to its own cross-attention, and then no branch can tell
    it much. With a share of samples whose decoder hears "" in training, it learns to follow.

    Args:
        stock: the parts of the whole.
        cards: by part, the card of the model that it came from.
        empty_decoder: share of the training samples whose decoder hears the empty text.
    """

    def __init__(self, stock: Backbone, cards: dict[str, Path], empty_decoder: float = 0.0) -> None:
        captions = EnglishCaptions(stock.text_encoder, stock.tokenizer)
        self._stock = StockPreview(stock, captions)
        super().__init__(stock.unet, captions, self._stock)
        self.text_encoder = stock.text_encoder
        self._cards = cards
        self.empty_decoder = empty_decoder
        self._decoder_text: Tensor | None = None
        self._silence: Tensor | None = None
        if empty_decoder:
            self._divert()

    def _divert(self) -> None:
        """Let the decoder hear a text of its own where there is one.

        It ends with the denoiser, or with the process while its modules are still there.
        """
        hung, itself = ExitStack(), weakref.ref(self)
        weakref.finalize(self, hung.close)

        def divert(module: nn.Module, given: Any, named: dict[str, Any]) -> Any:
            denoiser = itself()
            text = None if denoiser is None else denoiser._decoder_text
            if text is None or named.get("encoder_hidden_states") is None:
                return None
            return given, {**named, "encoder_hidden_states": text}

        for block in self.unet.up_blocks:
            hang_before(hung, block, divert)

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def given(self, batch: Batch) -> dict[str, Tensor]:
        if not (self.empty_decoder and self.training):
            return {}
        return {"empties": batch.rand() < self.empty_decoder}

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, **given: Tensor) -> Tensor:
        """See ``Denoiser``; the decoder of samples in ``empties`` (B,) hears the empty text."""
        empties = given.get("empties")
        if empties is None:
            return super().predict(x_t, t, text)
        if self._silence is None:  # once: the text encoder is frozen
            with torch.no_grad():
                self._silence = self.captions.encode([""])
        try:
            silence = self._silence.to(text)
            self._decoder_text = torch.where(empties.to(text.device)[:, None, None], silence, text)
            return super().predict(x_t, t, text)
        finally:
            self._decoder_text = None

    def save(self, folder: Path) -> None:
        """Write a diffusers folder."""
        self._stock.pipeline().save_pretrained(folder)
        for part, card in self._cards.items():
            if card.is_file():
                shutil.copy(card, folder / part / "card.json")


def backbone_recipe(
    source: Source,
    vae: str | AutoencoderKL,
    text_encoder: str | CLIPTextModel | None = None,
    unet: dict[str, Any] | None = None,
    backbone: str | Backbone | None = None,
    *,
    native_text_encoder: Encoder | None = None,
    train_text_encoder: bool = False,
    shuffle_captions: bool = False,
    empty_decoder: float = 0.0,
    prediction: Prediction | None = None,
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Train a UNet beside a frozen VAE and text encoder: CLIP's, or a native one, which may be trained too.

    Args:
        source: pictures with captions, English or native as the text encoder.
        vae: the VAE, or its folder.
        text_encoder: the text part of a CLIP with CLIP's own vocabulary, or a CLIP's folder.
        unet: arguments of ``UNet2DConditionModel``, for a fresh one.
        backbone: a trained backbone, or its folder, file or hub name, to go on from in its place.
        native_text_encoder: see ``native_text_recipe``; in place of ``text_encoder``.
        train_text_encoder: train the native text encoder beside the UNet.
        shuffle_captions: see ``NativeCaptions``; for native ones.
        empty_decoder: see ``BackboneDenoiser``; for English ones.
        prediction: what the UNet predicts; the noise if None.
        seed: seed of the run.
        rest: see ``DenoisingRecipe``.
    """
    named = {"vae": vae, "text_encoder": text_encoder}
    cards = {part: Path(folder) / "card.json" for part, folder in named.items() if isinstance(folder, str)}
    loaded = load_vae(vae) if isinstance(vae, str) else vae
    stock = Backbone(
        vae=loaded,
        text_encoder=load_clip_text(text_encoder) if isinstance(text_encoder, str) else text_encoder,
        tokenizer=clip_tokenizer() if text_encoder is not None else None,
        unet=_unet(unet, backbone, seed, loaded),
        scheduler=_scheduler(prediction or "epsilon"),
    )
    if native_text_encoder is not None:
        origin, native = open_encoder(native_text_encoder, stock, seed)
        check_prepared(source, vae=(vae, stock.vae), native=(origin, native), trained=train_text_encoder)
        denoiser = TextSlotDenoiser(
            stock, native, ("unet", "text_encoder") if train_text_encoder else ("unet",)
        )
        if shuffle_captions:
            denoiser.captions = NativeCaptions(native, source, seed)
    else:
        check_prepared(source, vae=(vae, stock.vae))
        denoiser = BackboneDenoiser(stock, cards, empty_decoder)
    return DenoisingRecipe(source, denoiser, stock.vae, prediction=prediction, seed=seed, **rest)


def _scheduler(prediction: Prediction) -> DDIMScheduler:
    settings: dict[str, Any] = {**SD15_SCHEDULE, "prediction_type": prediction}
    return DDIMScheduler(**settings)


def _unet(arguments: dict[str, Any] | None, backbone: str | Backbone | None, seed: int, vae: Any) -> Any:
    """A fresh UNet, or a backbone's.

    Raises:
        UserError: the backbone's learned the latents of another VAE.
    """
    if backbone is None:
        torch.manual_seed(seed)
        return UNet2DConditionModel(**arguments or {})
    if isinstance(backbone, Backbone):
        return backbone.unet
    own = load_backbone(backbone)
    if not same_latents(vae_sketch(own.vae), vae_sketch(vae)):
        raise UserError(
            f"recipe.backbone {backbone} has another VAE than recipe.vae names, and its UNet learned the"
            " latents of its own; give that VAE, or recipe.unet for a fresh one"
        )
    return own.unet
