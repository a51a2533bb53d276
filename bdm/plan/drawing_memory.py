"""What drawing takes of a GPU's memory under each low-memory setting, worked out from shapes.

No GPU, no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from ..errors import UserError
from ..method.branch import BranchModel
from ..method.bridge import Bridge
from ..method.condition import NativeCondition
from ..models.backbone import Backbone
from ..plugins.controlnet_hook import ControlCondition, ControlNetHook
from ..text.english import encode_english
from ..text.native import NativeTextEncoder
from .fake_device import FakeDevice
from .meta_models import make_meta_backbone, make_meta_native_text_encoder
from .sizes import CUDA_CONTEXT, GIB

#: GPUs that people have, in GiB.
CARDS = (4, 6, 8, 12, 16, 24)

#: A prompt of usual length: one chunk of tokens.
PROMPT = "红灯笼，蓝色背景"

#: Ways to decode: all pictures at once, one at a time, and each of them in tiles of the VAE's own size.
DECODINGS = ("whole", "sliced", "tiled")

#: Name of a setting, how it is switched on, where its weights are, and how it decodes.
SETTINGS = (
    ("everything on the GPU", "pipe.to('cuda')", "everything", "whole"),
    ("... pictures decoded one by one", "pipe.vae.enable_slicing()", "everything", "sliced"),
    (
        "... decoded in tiles",
        "pipe.vae.enable_slicing(); pipe.vae.enable_tiling()",
        "everything",
        "tiled",
    ),
    ("model offload", "pipe.enable_model_cpu_offload()", "model", "whole"),
    ("... pictures decoded one by one", "and pipe.vae.enable_slicing()", "model", "sliced"),
    ("sequential offload", "pipe.enable_sequential_cpu_offload()", "sequential", "whole"),
    ("... pictures decoded one by one", "and pipe.vae.enable_slicing()", "sequential", "sliced"),
    ("... decoded in tiles", "and pipe.vae.enable_tiling()", "sequential", "tiled"),
)

Task = Callable[[FakeDevice], Any]


@dataclass(frozen=True)
class Stage:
    """A part of a call during which the same models work.

    Attributes:
        weights: bytes of each model's weights.
        largest: bytes of the largest layer's weights among them.
        working: most bytes in use besides weights, with the workspace of the largest convolution.
    """

    weights: dict[str, int]
    largest: int
    working: int


@dataclass(frozen=True)
class Setting:
    """One way to draw: its name, how it is switched on, and the peak in bytes, CUDA's context included."""

    name: str
    how: str
    peak: float

    @property
    def card(self) -> int | None:
        """The smallest usual GPU that has it, in GiB; None where none does."""
        return next((card for card in CARDS if self.peak <= card * GIB), None)


def drawing_memory(
    backbone: str, native_text_encoder: str, height: int, width: int, count: int, dtype: torch.dtype
) -> list[Setting]:
    """Peak memory of a guided call under diffusers' settings.

    Args:
        backbone: SD1.5 model: file, folder or hub name; none of its values is read.
        native_text_encoder: likewise.
        height: of the pictures in pixels.
        width: likewise.
        count: pictures at once.
        dtype: of all weights.

    Raises:
        UserError: a size that is no multiple of 8, or models that are not known.
    """
    if min(height, width) < 64 or height % 8 or width % 8 or count < 1:
        raise UserError(
            f"{count} pictures of {width}x{height}: sides must be multiples of 8 from 64 on, and the count at"
            " least 1"
        )
    stages = draw_stages(backbone, native_text_encoder, (height // 8, width // 8), count, dtype)
    peaks = {"everything": _everything, "model": _model_offload, "sequential": _sequential_offload}
    return [
        Setting(name, how, peaks[offload](_during(stages, decoding)) + CUDA_CONTEXT)
        for name, how, offload, decoding in SETTINGS
    ]


def _during(stages: dict[str, Stage], decoding: str) -> dict[str, Stage]:
    """The stages of a call that decodes in this way."""
    return {name: stage for name, stage in stages.items() if name not in DECODINGS or name == decoding}


def _everything(stages: dict[str, Stage]) -> float:
    """The peak where all weights stay on the GPU."""
    weights = {name: size for stage in stages.values() for name, size in stage.weights.items()}
    return sum(weights.values()) + max(stage.working for stage in stages.values())


def _model_offload(stages: dict[str, Stage]) -> float:
    """The peak where models come when they work; the branch comes with the first step and stays."""
    branch = stages["step"].weights["branch"]
    return max(
        sum(stage.weights.values()) + stage.working + (branch if name in DECODINGS else 0)
        for name, stage in stages.items()
    )


def _sequential_offload(stages: dict[str, Stage]) -> float:
    """The peak where layers come one by one."""
    return max(stage.largest + stage.working for stage in stages.values())


def draw_stages(
    backbone: str,
    native_text_encoder: str,
    latents: tuple[int, int],
    count: int,
    dtype: torch.dtype,
    controlnets: int = 0,
) -> dict[str, Stage]:
    """The stages of a guided call, each worked out apart (see ``drawing_memory``).

    Args:
        backbone: see ``drawing_memory``.
        native_text_encoder: likewise.
        latents: their height and width.
        count: pictures at once.
        dtype: of all weights.
        controlnets: that act in the step.

    Returns:
        "text", "English text", "step", and the ways to decode (see ``DECODINGS``).
    """
    stock = make_meta_backbone(backbone)
    native = make_meta_native_text_encoder(native_text_encoder)
    with torch.device("meta"):
        branch = BranchModel.from_backbone(stock.unet, native.text_dim)
        made: Any = partial(ControlNetModel.from_unet, stock.unet, load_weights_from_unet=False)
        controls: list[Any] = [made() for _ in range(controlnets)]
    for model in (native, stock.text_encoder, stock.unet, branch, stock.vae, *controls):
        nn.Module.to(model.eval().requires_grad_(False), dtype=dtype)
    work = _GuidedCall(stock, native, branch, controls, latents, count, dtype)
    stepping = {"unet": stock.unet, "branch": branch}
    stepping |= {f"controlnet {i}": network for i, network in enumerate(controls, 1)}
    english = _stages_of({"text_encoder": stock.text_encoder}, {"English text": work.encode_english})
    return {
        **_stages_of({"native_text_encoder": native}, {"text": work.encode_native}),
        **english,
        **_stages_of(stepping, {"step": work.step}),
        **_stages_of({"vae": stock.vae}, {way: partial(work.decode, way) for way in DECODINGS}),
    }


@dataclass(frozen=True)
class _GuidedCall:
    """What a guided call of ``BridgePipeline`` does with its models, a method for each stage."""

    stock: Backbone
    native: NativeTextEncoder
    branch: BranchModel
    controlnets: list[Any]
    latents: tuple[int, int]
    count: int
    dtype: torch.dtype

    def encode_native(self, fake: FakeDevice) -> None:
        self.native.encode([PROMPT] * self.count + [""] * self.count)

    def encode_english(self, fake: FakeDevice) -> None:
        encode_english([""] * 2, self.stock.text_encoder, self.stock.tokenizer)

    def step(self, fake: FakeDevice) -> None:
        native, unet, count = self.native, self.stock.unet, self.count
        features = fake.blank(count, native.layout.joined_length(1), native.text_dim, dtype=self.dtype)
        english = fake.blank(2 * count, 77, unet.config["cross_attention_dim"], dtype=self.dtype)
        sample = fake.blank(2 * count, 4, *self.latents, dtype=self.dtype)
        picture = fake.blank(1, 3, *(8 * side for side in self.latents), dtype=self.dtype)
        bridge = Bridge(self.branch)
        with ExitStack() as stack:
            for network in self.controlnets:
                hook = ControlNetHook(network)
                hook.attach(stack, unet)
                stack.enter_context(hook.condition(ControlCondition(picture, lambda: 1)))
            stack.callback(bridge.detach)
            bridge.attach(unet)
            stack.enter_context(bridge.condition(NativeCondition(features, features)))
            unet(sample, torch.tensor(500), english)

    def decode(self, way: str, fake: FakeDevice) -> None:
        vae: Any = self.stock.vae
        vae.use_slicing, vae.use_tiling = way != "whole", way == "tiled"
        vae.decode(fake.blank(self.count, 4, *self.latents, dtype=self.dtype))


@torch.no_grad()
def _stages_of(models: dict[str, Any], tasks: dict[str, Task]) -> dict[str, Stage]:
    fake, stages = FakeDevice(), {}
    with fake:
        for name, model in models.items():
            fake.place(model, lambda _, name=name: name)
        weights = dict(fake.live)
        layers = [
            sum(p.numel() * p.element_size() for p in part._parameters.values() if p is not None)
            for model in models.values()
            for part in model.modules()
        ]
        fake.label = "working"
        for name, task in tasks.items():
            fake.reset_peak()
            fake.largest_convolution = 0
            task(fake)
            stages[name] = Stage(
                weights, max(layers), fake.peak - sum(weights.values()) + fake.largest_convolution
            )
    return stages


def memory_table(settings: list[Setting]) -> str:
    """A line a setting: peak, the smallest usual GPU that has it, and how it is switched on."""
    lines = [f"{'setting':<34} {'peak':>9}  {'smallest GPU':>12}  switched on by"]
    for setting in settings:
        card = f"{setting.card} GB" if setting.card else "none usual"
        lines.append(f"{setting.name:<34} {setting.peak / GIB:>5.2f} GiB  {card:>12}  {setting.how}")
    return "\n".join(lines)
