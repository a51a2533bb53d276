"""Tiny pipelines and their inputs, as diffusers' test classes ask for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from community_files import make_controlnet
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from tiny import NATIVE_DIM, make_branch, make_native, make_text_encoder, make_unet, make_vae
from torch import Tensor

from bdm import Bridge, NativeCondition
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.pipeline import (
    BridgeControlNetPipeline,
    BridgeImg2ImgPipeline,
    BridgeInpaintPipeline,
    BridgePipeline,
)
from bdm.text.english import encode_english
from bdm.text.vocabulary import clip_tokenizer

SIDE = 64
IMAGE, MASK, CONTROL = "image", "mask_image", "control_image"


@dataclass(frozen=True)
class Case:
    """A pipeline that diffusers' tests are run on.

    Attributes:
        kind: its class.
        images: its inputs that are pictures.
        options: further inputs.
        controlnets: how many it has.
        prompt: what is drawn.
        missing: inputs that it does not take, of those that all stock pipelines of its sort take.
        old_tests: whether it also passes the unittest classes that the pytest classes repeat.
    """

    kind: Any
    images: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    controlnets: int = 0
    prompt: str = "a lantern of red paper hangs in front of the door"
    missing: frozenset[str] = frozenset()
    old_tests: bool = False

    @property
    def moves(self) -> bool:
        return issubclass(self.kind, AnimateDiffPipeline)

    def components(self) -> dict[str, Any]:
        """Parts that are the same at every call."""
        torch.manual_seed(0)
        unet = make_unet()
        parts = dict(unet=unet, scheduler=DDIMScheduler(**SD15_SCHEDULE), vae=make_wide_vae())
        parts |= dict(text_encoder=make_text_encoder(), tokenizer=clip_tokenizer())
        parts |= dict(feature_extractor=None, image_encoder=None)
        if self.controlnets:
            made = [make_controlnet(unet) for _ in range(self.controlnets)]
            parts |= dict(controlnet=made[0] if self.controlnets == 1 else made)
        if self.is_ours:
            parts |= dict(branch=make_branch(unet), native_text_encoder=make_native())
        if self.moves:
            adapter = MotionAdapter(
                block_out_channels=(16, 16, 32, 32), motion_num_attention_heads=2, motion_norm_num_groups=8
            ).eval()
            return parts | dict(motion_adapter=adapter)
        return parts | dict(safety_checker=None)

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """What is drawn, the same at every call."""
        values = {
            "prompt": self.prompt,
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
        }
        return values | {name: picture(name) for name in self.images} | self.options

    @property
    def reads_latents(self) -> bool:
        """Whether latents may stand for the picture: image to image, as in diffusers' own cases."""
        return self.images == (IMAGE,) and "strength" in self.options

    @property
    def is_ours(self) -> bool:
        return issubclass(self.kind, BridgePipelines)

    @torch.no_grad()
    def english_features(self) -> dict[str, Any]:
        """Inputs of ours that say "" in English without a text encoder; a stock pipeline has none."""
        if not self.is_ours:
            return {}
        parts = self.components()
        features = encode_english([""], parts["text_encoder"], parts["tokenizer"])
        return {"prompt_en_embeds": features, "negative_prompt_en_embeds": features}

    @torch.no_grad()
    def native_features(self) -> dict[str, Any]:
        """Inputs of ours that take the prompt's place."""
        if not self.is_ours:
            return {}
        positive, negative = self.components()["native_text_encoder"].encode([self.prompt, ""]).split(1)
        return {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}


BridgePipelines = (
    BridgePipeline, BridgeImg2ImgPipeline, BridgeInpaintPipeline, BridgeControlNetPipeline
)  # fmt: skip


def make_wide_vae() -> Any:
    """A VAE whose tiles are as large as the pictures: tiles of 4 x 4 latents would show on random weights."""
    vae = make_vae()
    vae.tile_sample_min_size, vae.tile_latent_min_size = SIDE, SIDE // 8
    return vae


def picture(name: str) -> Tensor:
    """(1, 3, SIDE, SIDE) in [0, 1], or a mask of one channel."""
    channels = np.random.RandomState(0).rand(1, 1 if name == MASK else 3, SIDE, SIDE).astype(np.float32)
    return torch.from_numpy(channels.round() if name == MASK else channels)


#: Bridges by UNet. They stay attached, as long as the UNet lives.
_BRIDGES: WeakKeyDictionary[torch.nn.Module, Bridge] = WeakKeyDictionary()


def bridged(kind: Any) -> Any:
    """A stock pipeline whose UNet has a bridge from the beginning; its calls have a native condition."""

    class Bridged(kind):
        @functools.wraps(kind.__init__)
        def __init__(self, *arguments: Any, **parts: Any) -> None:
            super().__init__(*arguments, **parts)
            if self.unet is not None and self.unet not in _BRIDGES:
                torch.manual_seed(1)
                _BRIDGES[self.unet] = Bridge(make_branch(make_unet())).attach(self.unet)

        @functools.wraps(kind.__call__)
        def __call__(self, *arguments: Any, **inputs: Any) -> Any:
            bridge = _BRIDGES[self.unet]
            bridge.branch.to(self._execution_device)
            each = inputs.get("num_images_per_prompt") or inputs.get("num_videos_per_prompt") or 1
            with bridge.condition(native_condition(count_prompts(inputs), each)):
                return super().__call__(*arguments, **inputs)

    Bridged.__name__ = Bridged.__qualname__ = kind.__name__
    return Bridged


def count_prompts(inputs: dict[str, Any]) -> int:
    """How many prompts a call has."""
    prompt = inputs.get("prompt")
    if prompt is None:
        return len(inputs["prompt_embeds"])
    return 1 if isinstance(prompt, str) else len(prompt)


def native_condition(prompts: int, each: int) -> NativeCondition:
    """Features that are a prompt's own, whatever it is drawn beside."""
    random = torch.Generator().manual_seed(7)
    features = torch.randn(9, 5, NATIVE_DIM, generator=random)
    return NativeCondition(features[:prompts], features[-1:], images_per_prompt=each)


CHINESE = "一盏红色的灯笼挂在门前"
STRENGTH = {"strength": 0.8}
WHOLE = {"strength": 1.0, "height": SIDE, "width": SIDE}
NO_SIZE = frozenset({"height", "width", "cross_attention_kwargs", "latents"})
PAG = {"pag_scale": 2.0}

OURS: dict[str, Case] = {
    "Text2Img": Case(BridgePipeline, prompt=CHINESE, old_tests=True),
    "Img2Img": Case(BridgeImg2ImgPipeline, (IMAGE,), STRENGTH, prompt=CHINESE, missing=NO_SIZE),
    "Inpaint": Case(BridgeInpaintPipeline, (IMAGE, MASK), WHOLE, prompt=CHINESE),
    "ControlNet": Case(BridgeControlNetPipeline, (IMAGE,), controlnets=1, prompt=CHINESE),
}

STOCK: dict[str, Case] = {
    "Text2Img": Case(bridged(StableDiffusionPipeline)),
    "Img2Img": Case(bridged(StableDiffusionImg2ImgPipeline), (IMAGE,), STRENGTH, missing=NO_SIZE),
    "Inpaint": Case(bridged(StableDiffusionInpaintPipeline), (IMAGE, MASK), WHOLE),
    "ControlNet": Case(bridged(StableDiffusionControlNetPipeline), (IMAGE,), controlnets=1),
    "ControlNetImg2Img": Case(
        bridged(StableDiffusionControlNetImg2ImgPipeline), (IMAGE, CONTROL), STRENGTH, controlnets=1
    ),
    "ControlNetInpaint": Case(
        bridged(StableDiffusionControlNetInpaintPipeline), (IMAGE, MASK, CONTROL), WHOLE, controlnets=1
    ),
    "PAG": Case(bridged(StableDiffusionPAGPipeline), options=PAG, old_tests=True),
    "PAGImg2Img": Case(bridged(StableDiffusionPAGImg2ImgPipeline), (IMAGE,), STRENGTH | PAG, missing=NO_SIZE),
    "PAGInpaint": Case(bridged(StableDiffusionPAGInpaintPipeline), (IMAGE, MASK), WHOLE | PAG),
    "PAGControlNet": Case(bridged(StableDiffusionControlNetPAGPipeline), (IMAGE,), PAG, controlnets=1),
    "AnimateDiff": Case(
        bridged(AnimateDiffPipeline), options={"num_frames": 2}, missing=frozenset({"num_images_per_prompt"})
    ),
}

Maker = Callable[[Case], type]
