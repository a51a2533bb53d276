"""Recipes that learn to take noise away: a denoiser, what it is told, and the loss of its predictions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.source import Source, to_pixels
from ...drawing.grid import labelled_grid
from ...errors import UserError
from ...method.loss import DenoisingLoss, LossWeight, TimestepDensity
from ...models.noise_schedule import NoiseSchedule, Prediction
from .base import VALIDATED, Recipe
from .captions import Captions, TextFeatures
from .latents import draw_latents, encode_source
from .preview import Preview, spread_captions
from .terms import BUCKETS, bucket_names, by_timestep


class Denoiser(nn.Module):
    """A UNet that is told texts, and predicts what of a noisy latent is noise, or its velocity.

    Args:
        unet: the network.
        captions: what it is told.
        preview: draws with it.
    """

    def __init__(self, unet: Any, captions: Captions, preview: Preview) -> None:
        super().__init__()
        self.unet, self.captions, self.preview = unet, captions, preview

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """See ``Recipe.parts``."""

    def recomputable(self) -> dict[str, Any]:
        """See ``Recipe.recomputable``."""
        return {"unet": self.unet}

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """What ``predict`` is given of a batch beside its texts."""
        return {}

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, **given: Tensor) -> Tensor:
        """The prediction for (B, C, h, w) latents at timesteps (B,), told features (B, L, D)."""
        return self.unet(x_t, t, text).sample

    def moments(self) -> Mapping[str, Mapping[str, Any]]:
        """See ``Recipe.moments``."""
        return {}

    def keep_frozen(self) -> None:
        """Keep in memory what a frozen text encoder makes of texts in front of what is trained behind it."""

    def facts(self) -> dict[str, Any]:
        """See ``Recipe.facts``."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """See ``Recipe.save``."""


class Told:
    """A denoiser that was told the texts of a batch: a function of noisy latents and timesteps.

    Args:
        denoiser: the networks.
        features: encodes texts.
        texts: B of them.
        given: see ``Denoiser.given``.
    """

    def __init__(
        self, denoiser: Denoiser, features: TextFeatures, texts: Sequence[Any], given: dict[str, Tensor]
    ) -> None:
        self._denoiser, self._features, self._given = denoiser, features, given
        self.text = features(texts)
        self.empty_texts = [""] * len(texts)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction for (B, C, h, w) latents at timesteps (B,)."""
        return self._denoiser.predict(x_t, t, self.text, **self._given)

    def empty(self) -> Tensor:
        """(B, L, D) features of no text."""
        return self._features(self.empty_texts)


class Loss(Protocol):
    """What a denoiser is trained with; see ``DenoisingLoss``."""

    schedule: NoiseSchedule

    def draw_timesteps(self, draws: Batch) -> Tensor: ...

    def error(self, denoise: Told, x_0: Tensor, t: Tensor, draws: Batch) -> Tensor: ...

    def __call__(self, denoise: Told, x_0: Tensor, t: Tensor, draws: Batch) -> Tensor: ...


class DenoisingRecipe(Recipe):
    """Latent diffusion: it draws latents, timesteps, noise and texts, and asks the loss.

    Args:
        source: pictures with captions.
        denoiser: what is trained.
        vae: frozen.
        empty_caption: share of the samples whose caption is dropped, for guidance.
        timesteps: density of the timesteps (see ``DenoisingLoss``).
        loss_weight: weight of the squared error by timestep (likewise).
        prediction: what the network predicts; what the frozen backbone does (``inherited``) if None.
        offset_noise: see ``DenoisingLoss``.
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
        denoiser: Denoiser,
        vae: Any,
        *,
        empty_caption: float = 0.1,
        timesteps: TimestepDensity = "uniform",
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
        self.vae, self.denoiser = vae, denoiser
        schedule = NoiseSchedule(_agreed(prediction, inherited))
        self.loss: Loss = DenoisingLoss(schedule, timesteps, loss_weight, offset_noise)
        self.empty_caption, self.cache = empty_caption, cache
        self.grid_prompts, self.grid_guidance = tuple(grid_prompts), grid_guidance
        self.features = TextFeatures(denoiser.captions.encode, keep=cache)
        if cache:
            denoiser.keep_frozen()

    def models(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, **dict(self.denoiser.named_children())}

    def parts(self) -> dict[str, nn.Module]:
        return self.denoiser.parts()

    def recomputable(self) -> dict[str, Any]:
        return self.denoiser.recomputable()

    def fill_caches(self, accelerator: Accelerator) -> None:
        if self.cache:
            self.source = encode_source(self.source, self.vae, accelerator)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        t = self.loss.draw_timesteps(batch)
        told = self._tell(batch, self._drop(batch))
        x_0 = draw_latents(self.vae, batch)
        errors = self.loss(told, x_0, t, batch)
        return {"loss": errors.mean(), **by_timestep(errors, t, len(self.loss.schedule))}

    def _drop(self, batch: Batch) -> list[Any]:
        """The texts of a batch, some of them dropped."""
        captions = self.denoiser.captions
        dropped = (batch.rand() < self.empty_caption).tolist()
        return [
            captions.dropped if drop else text for drop, text in zip(dropped, captions.of(batch), strict=True)
        ]

    def _tell(self, batch: Batch, texts: Sequence[Any]) -> Told:
        return Told(self.denoiser, self.features, texts, self.denoiser.given(batch))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Unweighted error per timestep bucket on held-out examples, noise and captions fixed."""
        width = len(self.loss.schedule) // BUCKETS
        figures = {}
        for bucket, name in enumerate(bucket_names(len(self.loss.schedule))):
            batch, count = self.fixed_share(VALIDATED, self.seed + bucket)
            t = (bucket * width + batch.randint(width)).to(self.vae.device)
            told = self._tell(batch, self.denoiser.captions.of(batch))
            errors = self.loss.error(told, draw_latents(self.vae, batch), t, batch)
            total = errors.sum() if count else errors.new_zeros(())
            figures[name] = self.share.mean(total, len(errors) if count else 0)
        return figures

    @torch.no_grad()
    def grid(self) -> Image.Image | None:
        held_out = self.source.validation
        prompts = [*self.grid_prompts[: self.grid_size]] or spread_captions(held_out, self.grid_size)
        if not prompts:
            return None
        pictures = self.draw(prompts, self.grid_guidance, self.seed)
        return labelled_grid(to_pixels(pictures.cpu()), prompts, columns=8, scale=3)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], guidance: float, seed: int) -> Tensor:
        """See ``Recipe.draw``."""
        places, size = self.share.places(len(prompts)), self.grid_size
        drawn = [
            self.denoiser.preview.draw(
                [prompts[i] for i in chosen], guidance, seed + chosen[0], self.source.validation
            )
            for chosen in (places[i : i + size] for i in range(0, len(places), size))
        ]
        return self.share.join(torch.cat(drawn), len(prompts))

    def moments(self) -> Mapping[str, Mapping[str, Any]]:
        return self.denoiser.moments()

    def facts(self) -> dict[str, Any]:
        return self.denoiser.facts()

    def save(self, folder: Path) -> None:
        self.denoiser.save(folder)


def _agreed(prediction: Prediction | None, inherited: Prediction | None) -> Prediction:
    """What a network predicts that joins a backbone which predicts ``inherited``."""
    if prediction and inherited and prediction != inherited:
        raise UserError(
            f"recipe.prediction is {prediction!r} and the backbone's scheduler says {inherited!r}; what"
            " joins a frozen backbone must predict the same: leave prediction out"
        )
    return prediction or inherited or "epsilon"
