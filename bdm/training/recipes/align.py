"""Parallel captions -> a native text encoder that says to a frozen UNet what the English one says.

What is compared is not the features but what the UNet's cross-attention (``attn2``) makes of them, as in IAP
(arXiv 2305.11540): features that differ where no query looks are as good as equal ones. Its outputs need a
pass of the UNet. Its keys and values need none: ``|W(a - b)|^2`` summed over all layers' ``W`` is one
quadratic form in ``a - b``, so a step costs the text encoder and one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...data.batch import Batch, fixed_batch
from ...data.source import Source
from ...errors import UserError
from ...method.hooks import hang_after
from ...method.loss import DenoisingLoss
from ...models.backbone import Backbone
from ...text.english import encode_english
from .captions import NativeCaptions, TextFeatures
from .denoising import DenoisingRecipe, Told
from .latents import draw_latents
from .native_text import Encoder, text_slot
from .text_slot import TextSlotDenoiser, TrainedPart

#: What is compared: outputs of cross-attention for a picture's own queries; keys and values, in the mean over
#: the text's tokens or token by token, as far as both have one at that position.
Match = Literal["attention", "pooled", "position"]
#: English captions are looked for in so many examples.
LOOKED_AT = 64


class AlignTold(Told):
    """A denoiser that was told a batch's captions, and their English.

    Args:
        denoiser: the networks.
        features: encodes native texts.
        texts: B native texts.
        rows: the K samples whose English is known.
        english: (K, M, E) features of it; None where there is none.
        tokens: of one chunk, native and English.
    """

    def __init__(
        self,
        denoiser: TextSlotDenoiser,
        features: TextFeatures,
        texts: Sequence[Any],
        rows: Sequence[int],
        english: Tensor | None,
        tokens: tuple[int, int],
    ) -> None:
        super().__init__(denoiser, features, texts, {})
        self.unet, self.english, self.tokens = denoiser.unet, english, tokens
        self.rows = torch.tensor(rows, dtype=torch.long, device=self.text.device)

    @property
    def native(self) -> Tensor:
        """(K, L, E) native features of the samples whose English is known."""
        return self.text[self.rows]


class AlignLoss(DenoisingLoss):
    """How far cross-attention's results with native features are from those with English ones.

    The squared difference over the squared English result: 0 is the same, and 1 as far as saying nothing.
    Outputs are compared in the mean over the layers; of keys and values every projection counts the same.

    Args:
        match: see ``Match``.
        unet: whose cross-attention it is.
        denoising: arguments of ``DenoisingLoss``, whose noise and timesteps pictures get.
    """

    def __init__(self, match: Match, unet: nn.Module, *denoising: Any) -> None:
        super().__init__(*denoising)
        self.match: Match = match
        self._form = None if match == "attention" else projected_form(unet)

    def forward(self, denoise: Any, x_0: Tensor, t: Tensor, draws: Any) -> Tensor:
        """(K,) errors; timesteps have no weights."""
        return self.error(denoise, x_0, t, draws)

    def error(self, denoise: Any, x_0: Tensor, t: Tensor, draws: Any) -> Tensor:
        """(K,) errors of the samples whose English is known."""
        if denoise.english is None:
            return denoise.text.new_zeros(0)
        if self.match == "attention":
            x_t = self.schedule.add_noise(x_0, self.noise(x_0, draws), t)[denoise.rows]
            pairs = attended(denoise.unet, x_t, t[denoise.rows], denoise.english, denoise.native)
            return torch.stack([_relative(ours, theirs) for theirs, ours in pairs]).mean(0)
        theirs, ours = denoise.english.float(), denoise.native.float()
        if self.match == "pooled":
            theirs, ours = theirs.mean(1, keepdim=True), ours.mean(1, keepdim=True)
        else:
            # Past the first chunk of either the two languages' tokens would be shifted against each other.
            common = min(denoise.tokens)
            theirs, ours = theirs[:, :common], ours[:, :common]
        assert self._form is not None
        self._form = self._form.to(theirs.device)
        size = _squared(theirs, self._form)
        return _squared(ours - theirs, self._form) / size.clamp(min=1e-12)


def attended(
    unet: Any, x_t: Tensor, t: Tensor, english: Tensor, native: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Each cross-attention's output (K, queries, C) with English features, and with native ones.

    Queries are those that noisy latents ask with where English is told.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, given: Any, named: Mapping[str, Any], output: Tensor) -> None:
        seen[module] = (given[0] if given else named["hidden_states"], output)

    with torch.no_grad(), ExitStack() as stack:
        for layer in _cross_attention(unet):
            hang_after(stack, layer, keep)
        unet(x_t.to(unet.dtype), t, english)
    return [
        (output, layer(queries, encoder_hidden_states=native)) for layer, (queries, output) in seen.items()
    ]


def projected_form(unet: nn.Module) -> Tensor:
    """(E, E) matrix G with ``x G x`` the squared length of what a UNet's keys and values are of a token x.

    Summed over all cross-attentions' projections (``to_k``, ``to_v``), each scaled to unit Frobenius norm, so
    that wide layers do not count for more.
    """
    weights = [
        getattr(layer, name).weight.detach().float()
        for layer in _cross_attention(unet)
        for name in ("to_k", "to_v")
    ]
    return torch.stack([weight.T @ weight / weight.square().sum() for weight in weights]).sum(0)


def _squared(features: Tensor, form: Tensor) -> Tensor:
    """(K,) quadratic form of (K, L, E) features, summed over the tokens."""
    return ((features @ form) * features).flatten(1).sum(1)


def _cross_attention(unet: nn.Module) -> list[Any]:
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """(K,) squared differences over squared size."""
    difference = (ours.float() - theirs.float()).square().flatten(1).sum(1)
    return difference / theirs.float().square().flatten(1).sum(1).clamp(min=1e-12)


class AlignRecipe(DenoisingRecipe):
    """A native text encoder that learns from the English one; samples without English are left out.

    Args:
        source: pictures with captions in both languages (see ``Example.english``).
        denoiser: the native text encoder in the text's place.
        stock: the model with the English one.
        match: what is compared.
        rest: see ``DenoisingRecipe``.

    Raises:
        UserError: no English captions, or no English text encoder.
    """

    denoiser: TextSlotDenoiser

    def __init__(
        self, source: Source, denoiser: TextSlotDenoiser, stock: Backbone, match: Match, **rest: Any
    ) -> None:
        super().__init__(source, denoiser, stock.vae, **rest)
        if stock.text_encoder is None:
            raise UserError("the model has no English text encoder to learn from; give a backbone with one")
        plain = self.loss
        assert isinstance(plain, DenoisingLoss)
        self.loss = AlignLoss(match, stock.unet, plain.schedule, plain.density)
        self.english_encoder, self._tokenizer = stock.text_encoder.requires_grad_(False), stock.tokenizer
        self._english = TextFeatures(self._encode_english, keep=self.cache)
        self._match = match
        for examples in (source, source.validation):
            _refuse_one_language(examples)
        with torch.no_grad():
            native = denoiser.native_text_encoder.encode([""])
        self._tokens = native.shape[1], self._encode_english([""]).shape[1]

    def models(self) -> dict[str, nn.Module]:
        return {**super().models(), "english_encoder": self.english_encoder}

    def fill_caches(self, accelerator: Accelerator) -> None:
        if self._match == "attention":
            super().fill_caches(accelerator)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.loss.draw_timesteps(batch)
        told = self._tell(batch, self._drop(batch))
        # Keys and values ask for no picture.
        seen = self._match == "attention"
        x_0 = draw_latents(self.vae, batch) if seen else torch.zeros(len(batch), 1, 1, 1)
        errors = self.loss(told, x_0, t, batch)
        # Without any English the gradients are zeros, which processes can share.
        loss = errors.sum() / max(1, len(errors)) + 0.0 * told.text.float().sum()
        return {"loss": loss, "parallel": torch.tensor(len(errors) / len(batch), device=loss.device)}

    def _tell(self, batch: Batch, texts: Sequence[Any]) -> AlignTold:
        dropped = self.denoiser.captions.dropped
        said = [
            "" if isinstance(text, str) and text == dropped else english
            for text, english in zip(texts, batch.english or [None] * len(texts), strict=True)
        ]
        rows = [i for i, english in enumerate(said) if english is not None]
        known = [english for english in said if english is not None]
        features = self._english(known).to(self.denoiser.unet.device) if known else None
        return AlignTold(self.denoiser, self.features, texts, rows, features, self._tokens)

    def _encode_english(self, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return encode_english(texts, self.english_encoder, self._tokenizer)


def _refuse_one_language(source: Source) -> None:
    batch = fixed_batch(source, LOOKED_AT, 0)
    if not any(english is not None for english in batch.english):
        raise UserError(
            f"recipe.kind is align, and none of {len(batch)} examples has its caption in English too, such as"
            f" {batch.captions[0][:40]!r}; name the field that has it (data.english; in the emoji world"
            " data.translations: true, and a language that is not en)"
        )


def align_recipe(
    source: Source,
    backbone: str | Backbone,
    native_text_encoder: Encoder | None = None,
    start: str | Mapping[str, Any] | None = None,
    *,
    train: Sequence[TrainedPart] = ("text_encoder",),
    connector: Mapping[str, Any] | None = None,
    match: Match = "attention",
    shuffle_captions: bool = False,
    seed: int = 0,
    **rest: Any,
) -> AlignRecipe:
    """Train a native text encoder, or a connector behind one, beside the English one.

    Args:
        source: pictures with captions in both languages.
        backbone: see ``native_text_recipe``.
        native_text_encoder: likewise.
        start: likewise.
        train: ``text_encoder``, ``connector`` or both.
        connector: see ``native_text_recipe``.
        match: see ``Match``.
        shuffle_captions: see ``NativeCaptions``; the English ones stay.
        seed: seed of the run.
        rest: see ``DenoisingRecipe``.

    Raises:
        UserError: see ``native_text_recipe`` and ``AlignRecipe``.
    """
    denoiser, stock = text_slot(
        source, backbone, native_text_encoder, start, train, connector=connector, seed=seed
    )
    if shuffle_captions:
        denoiser.captions = NativeCaptions(denoiser.native_text_encoder, source, seed)
    inherited = stock.scheduler.config["prediction_type"]
    return AlignRecipe(source, denoiser, stock, match, inherited=inherited, seed=seed, **rest)
