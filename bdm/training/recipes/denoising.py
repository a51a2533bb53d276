"""What every recipe shares that learns to take noise away.

Latents, timesteps, the error, its validation and the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...data.batch import Batch, fixed_batch
from ...data.source import Example, Source, UnreadableExample, example_or_reason, to_pixels, to_unit_range
from ...drawing.grid import labelled_grid
from ...errors import UserError
from ...models.backbone import encode_moments, sample_latents
from ...models.fingerprint import check_fingerprints, text_fingerprint, tokens_fingerprint, vae_fingerprint
from ...models.noise_schedule import LossWeight, NoiseSchedule, Prediction, Timesteps, denoising_error
from ...text.native import NativeTextEncoder
from .base import Recipe

#: Timestep buckets of the validation loss.
BUCKETS = 4

#: Pictures that the VAE encodes at once.
AT_ONCE = 16


class CachedSource:
    """A source whose pictures were encoded once; every draw of latents from the kept moments is still fresh.

    Args:
        source: what was encoded; whatever is asked of it beside examples it answers itself.
        examples: its examples without their pictures, or why one cannot be used.
        moments: (N, 2C, h, w) of the VAE posterior.
    """

    def __init__(
        self, source: Source, examples: Sequence[Example | UnreadableExample], moments: Tensor
    ) -> None:
        self._source, self._examples, self._moments = source, examples, moments

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        if isinstance(example, UnreadableExample):
            raise example
        return replace(example, moments=self._moments[index])

    def caption(self, index: int) -> str:
        return self._source.caption(index)

    @property
    def validation(self) -> Source:
        return self._source.validation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while a data worker unpickles it
            raise AttributeError(name)
        return getattr(self._source, name)


class DenoisingRecipe(Recipe):
    """The loss of latent diffusion, with an abstract ``predict`` that says which networks see which text.

    Args:
        source: pictures with captions.
        vae: frozen.
        empty_caption: share of the samples whose caption is dropped, that is becomes "", for guidance.
        timesteps: density of the timesteps (see ``NoiseSchedule.draw_timesteps``).
        loss_weight: weight of the squared error by timestep (see ``NoiseSchedule.weight``).
        prediction: what the network predicts; what the frozen backbone does (``inherited``) if None.
        offset_noise: standard deviation of a further noise that is one number for each channel, so that the
            mean colour of a picture, which the schedule hardly destroys, is learned too.
        inherited: what the backbone predicts, where there is one.
        cache: encode every picture once, before the first step, and every caption when it is first met, and
            keep them in memory.
        grid_prompts: prompts of the sample grid; captions of validation examples if empty.
        grid_guidance: guidance scale of the grid.
        seed: seed of the run.
    """

    def __init__(
        self,
        source: Source,
        vae: AutoencoderKL,
        empty_caption: float = 0.1,
        timesteps: Timesteps = "uniform",
        loss_weight: LossWeight = "none",
        prediction: Prediction | None = None,
        offset_noise: float = 0.0,
        inherited: Prediction | None = None,
        cache: bool = False,
        grid_prompts: Sequence[str] = (),
        grid_guidance: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seed)
        self.vae = vae
        if prediction and inherited and prediction != inherited:
            raise UserError(
                f"recipe.prediction is {prediction!r} and the backbone's scheduler says {inherited!r}; what"
                " joins a frozen backbone must predict the same: leave prediction out"
            )
        self.schedule = NoiseSchedule(prediction or inherited or "epsilon")
        self.offset_noise = offset_noise
        self.empty_caption, self.cache = empty_caption, cache
        self.timesteps: Timesteps = timesteps
        self.loss_weight: LossWeight = loss_weight
        self.grid_prompts, self.grid_guidance = tuple(grid_prompts), grid_guidance
        self._features: dict[str, Tensor] = {}

    @property
    def dropped_caption(self) -> str:
        """What a caption becomes when it is dropped."""
        return ""

    def encode_texts(self, texts: Sequence[Any]) -> Tensor:
        """(B, L, D) features of captions for the network that is trained."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Noise or velocity predicted for (B, C, h, w) latents at timesteps (B,), given caption features (B,
        L, D).
        """
        raise NotImplementedError

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Draw a picture for each prompt: (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def caption_of(self, batch: Batch) -> Sequence[Any]:
        """What the trained network is told, before some of it is dropped.

        Captions, or what was prepared for them.
        """
        return batch.captions

    def check_cache(self, vae: Any, native: tuple[Any, NativeTextEncoder] | None = None) -> None:
        """Refuse prepared data that was made with other models than this run's.

        Args:
            vae: what the VAE was loaded from, for the message.
            native: the same of the native text encoder, and the encoder, if there is one.

        Raises:
            UserError: see ``check_fingerprints``.
        """
        cached = getattr(self.source, "fingerprints", None)
        if not cached:
            return
        own = {"vae": (vae, vae_fingerprint(self.vae))}
        if native is not None:
            own["text_encoder"] = (native[0], text_fingerprint(native[1]))
            own["tokenizer"] = (native[0], tokens_fingerprint(native[1]))
        check_fingerprints(cached, own, getattr(self.source, "origin", "the data"))

    @torch.no_grad()
    def fill_caches(self, accelerator: Accelerator) -> None:
        if not self.cache:
            return
        own = range(accelerator.process_index, len(self.source), accelerator.num_processes)
        bar = tqdm(own, desc="encoding pictures", disable=not accelerator.is_main_process, mininterval=2)
        examples: list[Example | UnreadableExample] = []
        moments: list[Tensor | None] = []
        for start in range(0, len(own), 64):
            found = [example_or_reason(self.source, i) for i in own[start : start + 64]]
            encoded = iter(
                self._encode_pictures(
                    [e.pixels for e in found if isinstance(e, Example) and e.pixels is not None]
                )
            )
            moments += [next(encoded) if isinstance(e, Example) else None for e in found]
            examples += [replace(e, pixels=None) if isinstance(e, Example) else e for e in found]
            bar.update(len(found))
        bar.close()
        some = next((m for m in moments if m is not None), None)
        if some is None:
            raise UserError(
                f"none of {len(own)} pictures can be used, the first because of {examples[:1]}; look at the"
                " data"
            )
        rows = torch.stack([torch.zeros_like(some) if m is None else m for m in moments])
        gathered = accelerator.gather(accelerator.pad_across_processes(rows))
        assert isinstance(gathered, Tensor)
        # Process r encoded pictures r, r + P, ...: interleave the processes' rows again.
        rows = gathered.view(accelerator.num_processes, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
        parts = gather_object([examples])
        ordered = [parts[i % len(parts)][i // len(parts)] for i in range(len(self.source))]
        self.source = CachedSource(self.source, ordered, rows[: len(self.source)].cpu())

    def _encode_pictures(self, pixels: list[Tensor]) -> Sequence[Tensor]:
        if not pixels:
            return []
        return encode_moments(self.vae, to_unit_range(torch.stack(pixels)).to(self.vae.device)).unbind()

    @torch.no_grad()
    def text_features(self, captions: Sequence[Any]) -> Tensor:
        """Caption features, each caption encoded once if caching is on."""
        if not self.cache:
            return self.encode_texts(captions)
        for caption in set(captions) - self._features.keys():
            # Alone, so that its features do not depend on when it is met, and a resumed run sees the same.
            self._features[caption] = self.encode_texts([caption])[0]
        rows = [self._features[caption] for caption in captions]
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else self.encode_texts(captions)

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) fresh scaled latents of a batch's pictures."""
        with torch.no_grad():
            if batch.moments is None:
                assert batch.pixels is not None
                # A validation's pictures at once would take more memory than a training step.
                parts = batch.pixels.split(AT_ONCE)
                moments = torch.cat(
                    [encode_moments(self.vae, to_unit_range(part.to(self.vae.device))) for part in parts]
                )
            else:
                moments = batch.moments.to(self.vae.device, torch.float32)
            noise = batch.randn(moments.shape[1] // 2, *moments.shape[2:]).to(moments)
            return sample_latents(self.vae, moments, noise)

    def errors(self, batch: Batch, t: Tensor, captions: Sequence[Any]) -> Tensor:
        """(B,) squared errors of the prediction at timesteps (B,)."""
        x_0 = self.latents(batch)
        eps = batch.randn(*x_0.shape[1:]).to(x_0)
        if self.offset_noise:
            eps = eps + self.offset_noise * batch.randn(x_0.shape[1], 1, 1).to(x_0)
        x_t = self.schedule.add_noise(x_0, eps, t)
        return denoising_error(
            self.predict(x_t, t, self.text_features(captions)), self.schedule.target(x_0, eps, t)
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.schedule.draw_timesteps(batch.rand().to(self.vae.device), self.timesteps)
        dropped = (batch.rand() < self.empty_caption).tolist()
        captions = [
            self.dropped_caption if drop else text
            for drop, text in zip(dropped, self.caption_of(batch), strict=True)
        ]
        return {"loss": (self.schedule.weight(t, self.loss_weight) * self.errors(batch, t, captions)).mean()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Unweighted error per timestep bucket on held-out examples, noise and captions fixed."""
        width = len(self.schedule) // BUCKETS
        figures = {}
        for bucket in range(BUCKETS):
            batch = fixed_batch(self.source.validation, 64, self.seed + bucket)
            t = (bucket * width + batch.randint(width)).to(self.vae.device)
            figures[f"t{bucket * width}-{(bucket + 1) * width}"] = (
                self.errors(batch, t, self.caption_of(batch)).mean().item()
            )
        return figures

    @torch.no_grad()
    def grid(self) -> Image.Image | None:
        prompts = [*self.grid_prompts[: self.grid_size]] or spread_captions(
            self.source.validation, self.grid_size
        )
        if not prompts:
            return None
        return labelled_grid(to_pixels(self.sample(prompts, self.seed).cpu()), prompts, columns=8, scale=3)


def spread_captions(source: Source, count: int) -> list[str]:
    """At most ``count`` different captions of evenly spread examples.

    Those without one are left out, as in ``fixed_batch``.
    """
    captions = []
    for i in range(0, len(source), len(source) // count + 1):
        with suppress(UnreadableExample):
            captions.append(source.caption(i))
    return list(dict.fromkeys(captions))
