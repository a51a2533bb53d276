"""What every recipe shares that learns to take noise away: latents, timesteps, the error, its validation and the grid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..backbone import encode_moments, sample_latents
from ..data.batch import Batch, fixed_batch
from ..data.source import Example, Source, UnreadableExample, to_pixels, to_unit_range
from ..errors import UserError
from ..fingerprint import check_fingerprints, text_fingerprint, tokens_fingerprint, vae_fingerprint
from ..grid import labelled_grid
from ..loss import LossWeight, NoiseSchedule, Prediction, Timesteps, denoising_error
from ..text.native import NativeTextEncoder
from .base import Recipe

#: Timestep buckets of the validation loss.
BUCKETS = 4

#: Pictures that the VAE encodes at once.
AT_ONCE = 16


class CachedSource:
    """A source whose pictures were encoded once; every draw of latents from the kept moments is still fresh."""

    def __init__(self, source: Source, moments: Tensor) -> None:
        self._source, self._moments = source, moments
        self._captions = [source.caption(i) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Example:
        return Example(self._captions[index], moments=self._moments[index])

    def caption(self, index: int) -> str:
        return self._captions[index]

    @property
    def validation(self) -> Source:
        return self._source.validation


class DenoisingRecipe(Recipe):
    """The loss of latent diffusion, with an abstract ``predict`` that says which networks see which text.

    Args:
        source: pictures with captions.
        vae: frozen.
        empty_caption: share of the samples whose caption becomes "", for guidance.
        timesteps: density of the timesteps (see ``NoiseSchedule.draw_timesteps``).
        loss_weight: weight of the squared error by timestep (see ``NoiseSchedule.weight``).
        prediction: what the network predicts; what the frozen backbone does (``inherited``) if None.
        offset_noise: standard deviation of a further noise that is one number for each channel, so that the mean colour of a
            picture, which the schedule hardly destroys, is learned too.
        inherited: what the backbone predicts, where there is one.
        cache: encode every picture and caption once, before the first step, and keep them in memory.
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
                f"recipe.prediction is {prediction!r} and the backbone's scheduler says {inherited!r}; what joins a frozen "
                "backbone must predict the same: leave prediction out"
            )
        self.schedule = NoiseSchedule(prediction or inherited or "epsilon")
        self.offset_noise = offset_noise
        self.empty_caption, self.cache = empty_caption, cache
        self.timesteps: Timesteps = timesteps
        self.loss_weight: LossWeight = loss_weight
        self.grid_prompts, self.grid_guidance = tuple(grid_prompts), grid_guidance
        self._features: dict[str, Tensor] = {}

    def encode_texts(self, texts: Sequence[Any]) -> Tensor:
        """(B, L, D) features of captions for the network that is trained."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Noise or velocity predicted for (B, C, h, w) latents at timesteps (B,), given caption features (B, L, D)."""
        raise NotImplementedError

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Draw a picture for each prompt: (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def caption_of(self, batch: Batch) -> Sequence[Any]:
        """What the trained network is told, before some of it is dropped: captions, or what was prepared for them."""
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
    def prepare(self, accelerator: Accelerator) -> None:
        if not self.cache:
            return
        own = range(accelerator.process_index, len(self.source), accelerator.num_processes)
        bar = tqdm(own, desc="encoding pictures", disable=not accelerator.is_main_process, mininterval=2)
        moments = []
        for start in range(0, len(own), 64):
            pixels = [self.source[i].pixels for i in own[start : start + 64]]
            pictures = to_unit_range(torch.stack([p for p in pixels if p is not None])).to(self.vae.device)
            moments.append(encode_moments(self.vae, pictures))
            bar.update(len(pixels))
        bar.close()
        gathered = accelerator.gather(accelerator.pad_across_processes(torch.cat(moments)))
        assert isinstance(gathered, Tensor)
        # Process r encoded pictures r, r + P, ...: interleave the processes' rows again.
        rows = gathered.view(accelerator.num_processes, -1, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
        self.source = CachedSource(self.source, rows[: len(self.source)].cpu())

    @torch.no_grad()
    def text_features(self, captions: Sequence[Any]) -> Tensor:
        """Caption features, each caption encoded once if caching is on."""
        if not self.cache:
            return self.encode_texts(captions)
        new = sorted(set(captions) - self._features.keys())
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self._features |= dict(zip(part, self.encode_texts(part), strict=True))
        return torch.stack([self._features[c] for c in captions])

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) fresh scaled latents of a batch's pictures."""
        with torch.no_grad():
            if batch.moments is None:
                assert batch.pixels is not None
                # A validation's pictures at once would take more memory than a training step.
                parts = batch.pixels.split(AT_ONCE)
                moments = torch.cat([encode_moments(self.vae, to_unit_range(part.to(self.vae.device))) for part in parts])
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
        return denoising_error(self.predict(x_t, t, self.text_features(captions)), self.schedule.target(x_0, eps, t))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.schedule.draw_timesteps(batch.rand().to(self.vae.device), self.timesteps)
        dropped = (batch.rand() < self.empty_caption).tolist()
        captions = ["" if drop else text for drop, text in zip(dropped, self.caption_of(batch), strict=True)]
        return {"loss": (self.schedule.weight(t, self.loss_weight) * self.errors(batch, t, captions)).mean()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Unweighted error per timestep bucket on held-out examples, noise and captions fixed."""
        width = len(self.schedule) // BUCKETS
        figures = {}
        for bucket in range(BUCKETS):
            batch = fixed_batch(self.source.validation, 64, self.seed + bucket)
            t = (bucket * width + batch.randint(width)).to(self.vae.device)
            figures[f"t{bucket * width}-{(bucket + 1) * width}"] = self.errors(batch, t, self.caption_of(batch)).mean().item()
        return figures

    @torch.no_grad()
    def grid(self) -> Image.Image | None:
        prompts = [*self.grid_prompts[: self.grid_size]] or spread_captions(self.source.validation, self.grid_size)
        if not prompts:
            return None
        return labelled_grid(to_pixels(self.sample(prompts, self.seed).cpu()), prompts, columns=8, scale=3)


def spread_captions(source: Source, count: int) -> list[str]:
    """At most ``count`` captions of evenly spread examples; those without one are left out, as in ``fixed_batch``."""
    captions = []
    for i in range(0, len(source), len(source) // count + 1):
        with suppress(UnreadableExample):
            captions.append(source.caption(i))
    return captions
