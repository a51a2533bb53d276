"""A pipeline's prompts in both languages, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..text.english import encode_english, english_chunks
from ..text.native import NativeTextEncoder
from ..text.pairs import TextPairs, encode_pairs, make_pairs

Texts = str | Sequence[str]


class TextsMixin:
    """How a bilingual pipeline reads its prompts."""

    unet: Any
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
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
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
        if embeds is not None and len(embeds) == 1:
            embeds = embeds.expand(count, -1, -1)
        return make_pairs(embeds, prompt, negative_embeds, negative, count, "prompt_en", "negative_prompt_en")

    def _native_lengths(self, pairs: TextPairs) -> list[int]:
        encoder = self.native_text_encoder
        return [0] * len(pairs) if encoder is None else pairs.chunks(encoder.chunks)

    def _english_lengths(self, pairs: TextPairs) -> list[int]:
        if self.tokenizer is None or self.text_encoder is None:
            return [0] * len(pairs)
        return pairs.chunks(lambda text: english_chunks(text, self.tokenizer))

    def _native_features(self, pairs: TextPairs) -> tuple[Tensor, Tensor]:
        return encode_pairs(pairs, self._encode_native, "negative_prompt_embeds")

    def _encode_native(self, texts: list[str]) -> Tensor:
        if self.native_text_encoder is None:
            raise UserError(
                "the pipeline has no native text encoder; give prompt_embeds and negative_prompt_embeds"
            )
        return self.native_text_encoder(texts)  # as a call, so that hooks that offload it see it

    def _english_features(self, pairs: TextPairs, clip_skip: int) -> tuple[Tensor, Tensor]:
        return encode_pairs(
            pairs, lambda texts: self._encode_english(texts, clip_skip), "negative_prompt_en_embeds"
        )

    def _encode_english(self, texts: list[str], clip_skip: int) -> Tensor:
        # Equal texts are encoded once; there are few of them however many prompts there are.
        distinct = list(dict.fromkeys(texts))
        if self.text_encoder is not None:
            features = encode_english(distinct, self.text_encoder, self.tokenizer, clip_skip)
        elif self.empty_english is not None and distinct == [""] and clip_skip == 1:
            features = self.empty_english.to(self.unet.dtype)
        else:
            raise UserError(
                "the pipeline has no English text encoder; give prompt_en_embeds and"
                " negative_prompt_en_embeds, or load it with english=True"
            )
        return features[[distinct.index(text) for text in texts]]
