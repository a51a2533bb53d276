"""A pipeline's prompts in both languages, encoded."""

# A mixin calls the methods of the stock pipeline it is mixed into, which the type checker cannot see.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ..errors import UserError
from ..text.english import encode_english, english_chunks
from ..text.native import NativeTextEncoder
from ..text.pairs import TextPairs, encode_pairs, make_pairs, sequence_of
from ..text.rules import A1111, PromptRules
from ..text.script import PictureScript

Texts = str | Sequence[str]


class TextsMixin:
    """How a bilingual pipeline reads its prompts."""

    unet: Any
    branch: Any
    text_encoder: Any
    tokenizer: Any
    native_text_encoder: NativeTextEncoder | None
    empty_english: Tensor | None

    def _native_pairs(
        self,
        prompt: Texts | None,
        negative: Texts | None,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
    ) -> TextPairs:
        if embeds is not None and prompt is not None:
            raise UserError("both prompt and prompt_embeds are given; give one of them")
        prompts = [prompt] if isinstance(prompt, str) else sequence_of(prompt or [], "prompt")
        if embeds is None and not prompts:
            raise UserError('no prompt is given; give at least one native prompt, such as "红灯笼"')
        return make_pairs(
            embeds, prompts, negative_embeds, negative, len(prompts), "prompt", "negative_prompt"
        )

    def _english_pairs(
        self,
        prompt: Texts | None,
        negative: Texts | None,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
        count: int,
    ) -> TextPairs:
        width = self.unet.config["cross_attention_dim"]
        _check_features(embeds, "prompt_en_embeds", count, width)
        _check_features(negative_embeds, "negative_prompt_en_embeds", count, width)
        if embeds is not None and len(embeds) == 1:
            embeds = embeds.expand(count, -1, -1)
        return make_pairs(embeds, prompt, negative_embeds, negative, count, "prompt_en", "negative_prompt_en")

    def _native_length(self, script: PictureScript, rules: PromptRules) -> int:
        """Chunks of a picture's longest native text."""
        encoder, own = self.native_text_encoder, self._native_rules(rules)
        return 0 if encoder is None else script.chunks(True, lambda text: encoder.chunks(text, own))

    def _native_rules(self, rules: PromptRules) -> PromptRules:
        """How native prompts are read: a text encoder whose brackets are text reads all of it as text.

        It comes from a system that knew no grammar and one chunk, and is read as there.
        """
        encoder = self.native_text_encoder
        if encoder is None or encoder.settings.brackets:
            return rules
        return dataclasses.replace(rules, emphasis="official", chunks="official")

    def _english_length(self, script: PictureScript, rules: PromptRules) -> int:
        if self.tokenizer is None or self.text_encoder is None:
            return 0
        length = script.chunks(False, lambda text: english_chunks(text, self.tokenizer, rules))
        # Without a branch English that says nothing is left out, and the features are shorter.
        return length if self.branch is not None or any(script.texts(native=False)) else -1

    def encode_prompt(
        self,
        prompt: Texts | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        rules: PromptRules = A1111,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode native prompts before they are drawn, under diffusers' name for that.

        Args:
            prompt: P native prompts.
            device: where the features come to lie; where the pipeline computes by default.
            num_images_per_prompt: how often each prompt's features are repeated.
            do_classifier_free_guidance: whether negative features are wanted.
            negative_prompt: one native negative prompt, or P.
            prompt_embeds: (P, L, D) features instead of ``prompt``.
            negative_prompt_embeds: (P, L, D) features instead of ``negative_prompt``.
            lora_scale: of no effect; adapters change the English text encoder alone.
            clip_skip: likewise.
            rules: how prompts are read; what is scheduled, or joined by AND, is read in calls alone.

        Returns:
            (P x num_images_per_prompt, L, D) features as ``prompt_embeds`` takes them, and the same for
            ``negative_prompt_embeds``.

        Raises:
            UserError: no prompt, numbers that do not fit, or no native text encoder where one is needed.
        """
        nothing_wanted = negative_prompt_embeds is not None or not do_classifier_free_guidance
        if prompt is None and prompt_embeds is not None and nothing_wanted:
            # Nothing is to be encoded. The stock pipeline's call comes here, too, with its English features.
            prompt_embeds, negative_prompt_embeds = super().encode_prompt(
                None, device, num_images_per_prompt, do_classifier_free_guidance, None, prompt_embeds,
                negative_prompt_embeds, lora_scale, clip_skip,
            )  # fmt: skip
        else:
            pairs = self._native_pairs(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            positive, negative = self._native_features(pairs, do_classifier_free_guidance, rules)
            negative = negative if do_classifier_free_guidance else negative_prompt_embeds
            place = self._execution_device if device is None else device
            prompt_embeds, negative_prompt_embeds = (
                None if side is None else side.to(place).repeat_interleave(num_images_per_prompt, 0)
                for side in (positive, negative)
            )
        return prompt_embeds, negative_prompt_embeds

    def _native_features(
        self, pairs: TextPairs, guided: bool, rules: PromptRules
    ) -> tuple[Tensor, Tensor | None]:
        if not guided and self.native_text_encoder is None and pairs.only_positive is not None:
            return pairs.only_positive, None
        rules = self._native_rules(rules)
        encode = partial(self._encode_native, rules=rules)
        return encode_pairs(pairs, encode, "negative_prompt_embeds", self._encoded_together(pairs, rules))

    def _encoded_together(self, pairs: TextPairs, rules: PromptRules) -> bool:
        """Whether texts may differ in length; where they cannot, stock pipelines encode both sides apart."""
        encoder = self.native_text_encoder
        if encoder is None or encoder.settings.max_chunks > 1:
            return True
        texts = [text for side in (pairs.positive, pairs.negative) if isinstance(side, list) for text in side]
        return any(encoder.chunks(text, rules) > 1 for text in texts)

    def _encode_native(self, texts: list[str], rules: PromptRules = A1111) -> Tensor:
        if self.native_text_encoder is None:
            raise UserError(
                "the pipeline has no native text encoder; give prompt_embeds and negative_prompt_embeds"
            )
        return self.native_text_encoder(texts, rules)  # as a call, so that hooks that offload it see it

    def _english_features(
        self, pairs: TextPairs, clip_skip: int, guided: bool, rules: PromptRules
    ) -> tuple[Tensor, Tensor | None]:
        knows = self.text_encoder is not None or self.empty_english is not None
        if not guided and not knows and pairs.only_positive is not None:
            return pairs.only_positive, None
        return encode_pairs(
            pairs, lambda texts: self._encode_english(texts, clip_skip, rules), "negative_prompt_en_embeds"
        )

    def _encode_english(self, texts: list[str], clip_skip: int, rules: PromptRules = A1111) -> Tensor:
        # Equal texts are encoded once; there are few of them however many prompts there are.
        distinct = list(dict.fromkeys(texts))
        if self.text_encoder is not None:
            features = encode_english(distinct, self.text_encoder, self.tokenizer, clip_skip, rules)
        elif self.empty_english is not None and distinct == [""] and clip_skip == 1:
            features = self.empty_english.to(self.unet.dtype)
        else:
            by_text = self.branch is None and self.native_text_encoder is not None
            remedy = "load it with text_encoder= and tokenizer=" if by_text else "load it with english=True"
            raise UserError(
                "the pipeline has no English text encoder; give prompt_en_embeds and"
                f" negative_prompt_en_embeds, or {remedy}"
            )
        return features[[distinct.index(text) for text in texts]]


def _check_features(given: Any, name: str, count: int, width: int) -> None:
    """Refuse what are no features of one prompt, or of ``count``.

    Raises:
        UserError: says what they are.
    """
    shape = tuple(given.shape) if isinstance(given, Tensor) else None
    if shape is not None and (len(shape) != 3 or shape[0] not in (1, count) or shape[2] != width):
        raise UserError(
            f"{name} has shape {shape}; give features of each of the {count} prompts, or of one, as"
            f" ({count}, length, {width})"
        )


@contextmanager
def adapters_scaled(text_encoder: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """peft's adapters of the text encoder at the share of their strength that a call asks for.

    diffusers scales the UNet's by the same number, and leaves it to ``encode_prompt`` to scale these.
    """
    scale = (inputs.get("cross_attention_kwargs") or {}).get("scale")
    if text_encoder is None or scale is None:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)
