"""A branch that keeps its word: on backbones that are not quite its own, and beside English words.

The paper trains it on one backbone that is told "". Whoever draws attaches plug-ins and adds English words.
Of both it should leave alone what they do and add what the native prompt says, so its targets must not teach
it to undo them:

* where the data show what is told (an English background, a native concept), the data are the target;
* on another backbone, that backbone's own answer to the English caption is (self-distillation: the branch
  learns to say in Chinese what English says there);
* where there is no such caption, what the data say, moved by as much as the other backbone's answer to no
  prompt differs from the own one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.source import Source
from ...method.loss import DenoisingLoss
from ...models.backbone import Backbone
from ...text.english import encode_english
from .branch import BranchDenoiser
from .captions import TextFeatures
from .denoising import DenoisingRecipe, Told
from .latents import draw_latents
from .pool import BackbonePool, Variation
from .terms import by_timestep

#: What is right on another backbone: its answer to the English caption where there is one, always the data
#: moved by its difference, or the data (the control, which teaches the branch to undo what a plug-in does).
Target = Literal["caption", "shift", "data"]


class BilingualTold(Told):
    """A branch and its backbone, told the texts of a batch in both languages.

    Args:
        denoiser: the networks.
        features: encodes native texts.
        native: B native texts.
        english: (B, M, E) what the backbone is told.
    """

    def __init__(
        self, denoiser: BranchDenoiser, features: TextFeatures, native: Sequence[Any], english: Tensor
    ) -> None:
        super().__init__(denoiser, features, native, {"english": english})
        self._unet, self._nothing = denoiser.unet, denoiser.empty_english

    def on_this_backbone(self, target: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The target for the backbone as it is now, from the data's; the same for its own."""
        return target

    def answer(self, x_t: Tensor, t: Tensor, english: Tensor | None = None) -> Tensor:
        """What the backbone predicts without the branch, told (1 or B, M, E); "" if None."""
        text = self._nothing if english is None else english
        return self._unet(x_t.to(self._unet.dtype), t, text.expand(len(x_t), -1, -1)).sample


class VariedTold(BilingualTold):
    """The same on another backbone.

    Args:
        pool: whose variation is on.
        words: (1, M, E) what a variation's plug-ins are called by.
        teacher: (B, M, E) all that is told, in English; rows that ``taught`` leaves out are not read.
        taught: which samples' target is the backbone's own answer to that.
        told: see ``BilingualTold``.
    """

    def __init__(
        self, *told: Any, pool: BackbonePool, words: Tensor, teacher: Tensor, taught: Sequence[int]
    ) -> None:
        super().__init__(*told)
        self._pool, self._words, self._teacher, self._taught = pool, words, teacher, taught

    @torch.no_grad()
    def on_this_backbone(self, target: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The target (B, C, h, w) for the backbone as it is now, from the data's."""
        target, every = target.clone(), range(len(target))
        # By their numbers: a device is not waited for, and a plan has no values.
        taught, rest = (
            torch.tensor([i for i in every if (i in self._taught) == wanted], device=x_t.device)
            for wanted in (True, False)
        )
        if len(taught):
            target[taught] = self.answer(x_t[taught], t[taught], self._teacher[taught]).to(target)
        if len(rest):
            here = self.answer(x_t[rest], t[rest], self._words)
            with self._pool.lifted():
                own = self.answer(x_t[rest], t[rest])
            target[rest] += (here - own).to(target)
        return target


class RobustLoss(DenoisingLoss):
    """The denoising loss with targets for the backbone of the step (see the module's text)."""

    def target(self, denoise: Any, x_0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See ``DenoisingLoss``."""
        return denoise.on_this_backbone(super().target(denoise, x_0, eps, x_t, t), x_t, t)


class RobustBranchRecipe(DenoisingRecipe):
    """A branch that is trained on a pool of backbones, and beside English words.

    In a share of the steps the backbone is another (each process draws its own), which costs a step one or
    two passes of the backbone without gradients. Validation is the plain recipe's, on the backbone itself.

    Args:
        source: pictures with native captions; some with English ones and bilingual pairs (see ``Example``).
        denoiser: the branch and what it learns on.
        stock: the backbone.
        pool: its neighbours; None for none.
        bilingual: share of the samples that are told in both languages at once, where they have such a pair.
        target: what is right on another backbone.
        rest: see ``DenoisingRecipe``.
    """

    denoiser: BranchDenoiser

    def __init__(
        self,
        source: Source,
        denoiser: BranchDenoiser,
        stock: Backbone,
        pool: BackbonePool | None,
        bilingual: float = 0.0,
        target: Target = "caption",
        **rest: Any,
    ) -> None:
        super().__init__(source, denoiser, stock.vae, **rest)
        plain = self.loss
        assert isinstance(plain, DenoisingLoss)
        self.loss = RobustLoss(plain.schedule, plain.density, plain.weight_kind, plain.offset_noise)
        # Held as a module, so that it lies on the device beside the others.
        self.english_encoder, self._tokenizer = stock.text_encoder, stock.tokenizer
        self._pool, self._bilingual, self._target = pool, bilingual, target
        # Kept where the other texts are: as many captions as a corpus has do not fit into memory.
        self._english = TextFeatures(self._encode_english, keep=self.cache)

    def models(self) -> dict[str, nn.Module]:
        return {**super().models(), "english_encoder": self.english_encoder}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.loss.draw_timesteps(batch)
        variation = self._pool.draw(batch.generators[0]) if self._pool else None
        native, english = self._texts(batch)
        x_0 = draw_latents(self.vae, batch)
        told = self._tell_varied(batch, native, english, variation)
        errors = self.loss(told, x_0, t, batch)
        return {"loss": errors.mean(), **by_timestep(errors, t, len(self.loss.schedule))}

    def _texts(self, batch: Batch) -> tuple[list[Any], list[str]]:
        """What each sample is told, natively and in English."""
        native: list[Any] = self._drop(batch)
        english = [""] * len(batch)
        if not self._bilingual:
            return native, english
        for i, chosen in enumerate((batch.rand() < self._bilingual).tolist()):
            pair = batch.bilingual[i]
            if chosen and pair is not None:
                native[i], english[i] = pair
        return native, english

    def _tell_varied(
        self, batch: Batch, native: list[Any], english: list[str], variation: Variation | None
    ) -> BilingualTold:
        """The texts, encoded by the backbone of this step, which is then on until the next one begins."""
        if self._pool is None:
            return BilingualTold(self.denoiser, self.features, native, self._encode(english, None))
        self._pool.put(variation)
        words = self._pool.words(variation)
        told = self._encode([_join(text, words) for text in english], variation)
        if variation is None or self._target == "data":
            return BilingualTold(self.denoiser, self.features, native, told)
        captions = [self._said_in_english(batch, i, native[i], english[i]) for i in range(len(batch))]
        return VariedTold(
            self.denoiser,
            self.features,
            native,
            told,
            pool=self._pool,
            words=self._encode([words], variation),
            teacher=self._encode([_join(caption or "", words) for caption in captions], variation),
            taught=[i for i, caption in enumerate(captions) if caption is not None],
        )

    def _said_in_english(self, batch: Batch, i: int, native: Any, english: str) -> str | None:
        """All that a sample is told, in English; None where the data say it better or nobody knows."""
        if self._target != "caption" or english:
            return None
        if isinstance(native, str) and native == self.denoiser.captions.dropped:
            return ""
        return batch.english[i]

    def _encode(self, texts: list[str], variation: Variation | None) -> Tensor:
        """(B, M, E) features of English texts, by the text encoder as it is now."""
        changed = self._pool is not None and self._pool.changes_words(variation)
        features = self._encode_english(texts) if changed else self._english(texts)
        return features.to(self.denoiser.unet.device)

    def _encode_english(self, texts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(texts))
        features = encode_english(distinct, self.english_encoder, self._tokenizer)
        return features[[distinct.index(text) for text in texts]]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The plain recipe's figures, on the backbone itself."""
        with self._as_it_is():
            return super().validate()

    @torch.no_grad()
    def grid(self) -> Image.Image | None:
        with self._as_it_is():
            return super().grid()

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], guidance: float, seed: int) -> Tensor:
        with self._as_it_is():
            return super().draw(prompts, guidance, seed)

    def finish(self) -> None:
        """Give the backbone its own weights back, for whoever goes on with it."""
        if self._pool is not None:
            self._pool.lift()
        super().finish()

    def save(self, folder: Path) -> None:
        with self._as_it_is():
            super().save(folder)

    def _as_it_is(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pool is None else self._pool.lifted()

    def _tell(self, batch: Batch, texts: Sequence[Any]) -> Told:
        english = self.denoiser.empty_english.expand(len(batch), -1, -1)
        return BilingualTold(self.denoiser, self.features, texts, english)


def _join(text: str, words: str) -> str:
    return ", ".join(part for part in (text, words) if part)
