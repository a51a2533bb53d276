"""A training step: ours from cached moments and text beside the steps of diffusers' ControlNet recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..config import BenchTrainConfig
from ..method.bridge import Bridge
from ..method.condition import NativeCondition
from ..method.loss import DenoisingLoss
from ..models.backbone import encode_moments, sample_latents
from ..models.noise_schedule import SD15_SCHEDULE, NoiseSchedule
from ..speed.lean_backward import lean_backward
from .compare import OURS, Bench, Side, count_flops, stopwatch
from .networks import Networks, build_networks, freeze, peer_controlnet

#: CLIP-L's text encoder and Chinese CLIP huge's.
TEXT: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    bos_token_id=49406,
    eos_token_id=49407,
    pad_token_id=49407,
)
NATIVE_TEXT: dict[str, Any] = dict(
    vocab_size=21128, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch: what is read from the data set, what of it can be kept from epoch to epoch, and what makes
    one of the other.

    Attributes:
        pixels: (B, 3, 8h, 8w) in [-1, 1].
        english: (1, 77) tokens of "".
        native: (B, 52) tokens of the captions.
        moments: (B, 2C, h, w) of the VAE posterior.
        english_features: (1, 77, E).
        native_features: (B, 52, D).
        english_model: transformers text model of the English side.
        native_model: of the native side.
    """

    pixels: Tensor
    english: Tensor
    native: Tensor
    moments: Tensor
    english_features: Tensor
    native_features: Tensor
    english_model: Any
    native_model: Any


@dataclass(frozen=True)
class Drawn:
    """Noise that was drawn before, the same for all sides."""

    eps: Tensor

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape), the noise."""
        return self.eps.view(-1, *shape)

    def rand(self) -> Tensor:
        """Nothing else is drawn."""
        raise NotImplementedError


class TrainBench(Bench):
    """The same gradient of the same batch, and an AdamW step on it.

    The peer's step is that of diffusers' ControlNet recipe: pictures and texts are encoded in every step, or
    ("with caches") read from memory as ours are; AdamW and clipping as torch gives them by default. It is not
    charged for a condition picture's convolutions. All sides train the same parameters, so they must run one
    after the other. A side alone in its process (where its memory is measured) holds the VAE and the text
    encoders only if its step uses them.
    """

    def __init__(self, config: BenchTrainConfig) -> None:
        self.config = config
        self.peers = config.peers
        self._shared: tuple[Networks, Inputs] | None = None
        self._optimizers: dict[bool, torch.optim.Optimizer] = {}

    def side(self, name: str, count: bool = True) -> Side:
        networks, inputs = self._shared = self._shared or self._build()
        if not count and name != "recipe":
            networks, inputs = self._shared = _without_encoders(networks, inputs)
        loss = (
            self._our_loss(networks, inputs)
            if name == OURS
            else self._recipe_loss(networks, inputs, online=name == "recipe")
        )
        parameters = list(networks.branch.parameters())
        optimizer = self._optimizer(parameters, fused=name == OURS)

        def step() -> None:
            loss().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def gradient() -> Tensor:
            value = loss()
            value.backward()
            sampled = [p.grad.flatten()[::997].clone() for p in parameters if p.grad is not None]
            optimizer.zero_grad(set_to_none=True)
            return torch.cat([value.detach().view(1), *sampled])

        return Side(lambda: stopwatch(step), gradient, count_flops(gradient) if count else None)

    def _optimizer(self, parameters: list[nn.Parameter], fused: bool) -> torch.optim.Optimizer:
        """Ours is fused; both keep one state, so that the machine holds it once."""
        if fused not in self._optimizers:
            optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=fused or None)
            for other in self._optimizers.values():
                optimizer.state = other.state
            self._optimizers[fused] = optimizer
        return self._optimizers[fused]

    def _build(self) -> tuple[Networks, Inputs]:
        networks = build_networks(self.config)
        networks.branch.requires_grad_(True)
        if networks.native_text_encoder is not None:
            return networks, self._inputs(networks, networks.text_encoder, networks.native_text_encoder.model)
        return networks, self._inputs(networks, *_random_texts(self.config))

    @torch.no_grad()
    def _inputs(self, networks: Networks, english_model: Any, native_model: Any) -> Inputs:
        generator = torch.Generator().manual_seed(self.config.seed)
        device, dtype = networks.unet.device, networks.unet.dtype
        batch, side = (
            self.config.batch,
            self.config.latents * 2 ** (len(networks.vae.config["block_out_channels"]) - 1),
        )
        pixels = torch.rand(batch, 3, side, side, generator=generator).mul(2).sub(1).to(device, dtype)
        native = torch.randint(1000, native_model.config.vocab_size, (batch, 52), generator=generator).to(
            device
        )
        english = torch.tensor([[49406] + [49407] * 76], device=device)
        return Inputs(
            pixels=pixels,
            english=english,
            native=native,
            moments=encode_moments(networks.vae, pixels),
            english_features=english_model(english).last_hidden_state,
            native_features=native_model(native).last_hidden_state,
            english_model=english_model,
            native_model=native_model,
        )

    def _draws(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior's noise, the diffusion's noise and the timesteps, the same for all sides."""
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        shape = (len(inputs.moments), inputs.moments.shape[1] // 2, *inputs.moments.shape[2:])
        posterior, eps = (torch.randn(shape, generator=generator).to(inputs.moments) for _ in range(2))
        t = torch.randint(0, 1000, (len(inputs.moments),), generator=generator).to(inputs.moments.device)
        return posterior, eps, t

    def _our_loss(self, networks: Networks, inputs: Inputs) -> Callable[[], Tensor]:
        bridge = Bridge(networks.branch)
        denoising = DenoisingLoss(NoiseSchedule()).to(inputs.moments.device)
        english = inputs.english_features.expand(len(inputs.moments), -1, -1)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return networks.unet(x_t.to(inputs.moments.dtype), t, english).sample

        def loss() -> Tensor:
            posterior, eps, t = self._draws(inputs)
            x_0 = sample_latents(networks.vae, inputs.moments, posterior)
            bridge.attach(networks.unet)
            # Anew in every step, and folded anew, because the peers compute with the same UNet; in training
            # it is done once.
            try:
                with (
                    bridge.condition(NativeCondition(inputs.native_features)),
                    lean_backward(networks.unet),
                ):
                    return denoising(denoise, x_0, t, Drawn(eps)).mean()
            finally:
                bridge.detach()

        return loss

    def _recipe_loss(self, networks: Networks, inputs: Inputs, online: bool) -> Callable[[], Tensor]:
        controlnet = peer_controlnet(networks.unet, networks.branch)
        scheduler = DDPMScheduler(
            **{k: v for k, v in SD15_SCHEDULE.items() if k not in ("set_alpha_to_one", "steps_offset")}
        )

        def loss() -> Tensor:
            posterior, eps, t = self._draws(inputs)
            moments, english, native = inputs.moments, inputs.english_features, inputs.native_features
            if online:
                with torch.no_grad():
                    moments = encode_moments(networks.vae, inputs.pixels)
                    english = inputs.english_model(inputs.english.expand(len(eps), -1)).last_hidden_state
                    native = inputs.native_model(inputs.native).last_hidden_state
            noisy = scheduler.add_noise(sample_latents(networks.vae, moments, posterior), eps, t)  # pyright: ignore
            down, middle = controlnet(
                noisy, t, native, noisy.new_zeros(len(noisy), 3, 1, 1), return_dict=False
            )
            eps_hat = networks.unet(
                noisy, t, english.expand(len(noisy), -1, -1), down_block_additional_residuals=down,
                mid_block_additional_residual=middle, return_dict=False,
            )[0]  # fmt: skip
            return mse_loss(eps_hat.float(), eps.float())

        return loss


def _without_encoders(networks: Networks, inputs: Inputs) -> tuple[Networks, Inputs]:
    """What a step from caches needs: of the VAE its factor, of text encoders nothing."""
    vae = SimpleNamespace(config=networks.vae.config)
    networks = replace(networks, vae=vae, text_encoder=None, native_text_encoder=None)
    return networks, replace(inputs, english_model=None, native_model=None)


def _random_texts(config: BenchTrainConfig) -> tuple[nn.Module, nn.Module]:
    """Text encoders of full size with random weights: English, native."""
    from transformers import ChineseCLIPTextConfig, ChineseCLIPTextModel, CLIPTextConfig, CLIPTextModel

    english = CLIPTextModel(CLIPTextConfig(**TEXT | config.text))
    native = ChineseCLIPTextModel(
        ChineseCLIPTextConfig(**NATIVE_TEXT | config.native_text), add_pooling_layer=False
    )
    for model in (english, native):
        freeze(model, config)
    return english, native
