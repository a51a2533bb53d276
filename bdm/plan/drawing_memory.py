"""What drawing takes of a GPU's memory under each low-memory setting, worked out from shapes.

No GPU, no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..method.branch import BranchModel
from ..method.bridge import Bridge
from ..method.condition import NativeCondition
from ..text.english import encode_english
from .fake_device import FakeDevice
from .meta_models import make_meta_backbone, make_meta_native_text_encoder
from .plan import CUDA_CONTEXT, GIB

#: GPUs that people have, in GiB.
CARDS = (4, 6, 8, 12, 16, 24)

#: A prompt of usual length: one chunk of tokens.
PROMPT = "红灯笼，蓝色背景"

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
    weights = {name: size for stage in stages.values() for name, size in stage.weights.items()}

    def during(decoding: str) -> dict[str, Stage]:
        """The stages of a call that decodes in this way."""
        return {
            name: stage
            for name, stage in stages.items()
            if name in ("text", "English text", "step", decoding)
        }

    def everything(decoding: str) -> float:
        return sum(weights.values()) + max(stage.working for stage in during(decoding).values())

    def model_offload(decoding: str) -> float:
        # The branch comes with the first step and stays to the end of the call.
        stays = {decoding: weights["branch"]}
        return max(
            sum(s.weights.values()) + s.working + stays.get(name, 0) for name, s in during(decoding).items()
        )

    def sequential(decoding: str) -> float:
        return max(stage.largest + stage.working for stage in during(decoding).values())

    rows: list[tuple[str, str, float]] = [
        ("everything on the GPU", "pipe.to('cuda')", everything("whole")),
        ("... pictures decoded one by one", "pipe.vae.enable_slicing()", everything("sliced")),
        ("... decoded in tiles", "pipe.vae.enable_slicing(); pipe.vae.enable_tiling()", everything("tiled")),
        ("model offload", "pipe.enable_model_cpu_offload()", model_offload("whole")),
        ("... pictures decoded one by one", "and pipe.vae.enable_slicing()", model_offload("sliced")),
        ("sequential offload", "pipe.enable_sequential_cpu_offload()", sequential("whole")),
        ("... pictures decoded one by one", "and pipe.vae.enable_slicing()", sequential("sliced")),
        ("... decoded in tiles", "and pipe.vae.enable_tiling()", sequential("tiled")),
    ]
    return [Setting(name, how, peak + CUDA_CONTEXT) for name, how, peak in rows]


def draw_stages(
    backbone: str, native_text_encoder: str, latents: tuple[int, int], count: int, dtype: torch.dtype
) -> dict[str, Stage]:
    """The stages of a guided call, each worked out apart (see ``drawing_memory``).

    Args:
        backbone: see ``drawing_memory``.
        native_text_encoder: likewise.
        latents: their height and width.
        count: pictures at once.
        dtype: of all weights.

    Returns:
        "text", "English text", "step", and the ways to decode: "whole", "sliced" (one picture at a time),
        "tiled" (and each in tiles of the VAE's own size).
    """
    stock = make_meta_backbone(backbone)
    native = make_meta_native_text_encoder(native_text_encoder)
    with torch.device("meta"):
        branch = BranchModel.from_backbone(stock.unet, native.text_dim)
    vae: Any = stock.vae
    models: dict[str, Any] = {
        "native_text_encoder": native,
        "text_encoder": stock.text_encoder,
        "unet": stock.unet,
        "branch": branch,
        "vae": vae,
    }
    for model in models.values():
        nn.Module.to(model.eval().requires_grad_(False), dtype=dtype)
    height, width = latents

    def step(fake: FakeDevice) -> None:
        features = fake.blank(count, native.layout.joined_length(1), native.text_dim, dtype=dtype)
        english = fake.blank(2 * count, 77, stock.unet.config["cross_attention_dim"], dtype=dtype)
        sample = fake.blank(2 * count, 4, height, width, dtype=dtype)
        bridge = Bridge(branch).attach(stock.unet)
        with bridge.condition(NativeCondition(features, features)):
            stock.unet(sample, torch.tensor(500), english)
        bridge.detach()

    def decode(fake: FakeDevice, sliced: bool = False, tiled: bool = False) -> None:
        vae.use_slicing, vae.use_tiling = sliced, tiled
        vae.decode(fake.blank(count, 4, height, width, dtype=dtype))

    def of(*names: str, **tasks: Task) -> dict[str, Stage]:
        return _stages_of({name: models[name] for name in names}, tasks)

    english = of("text_encoder", text=lambda _: encode_english([""] * 2, stock.text_encoder, stock.tokenizer))
    return {
        **of("native_text_encoder", text=lambda _: native.encode([PROMPT] * count + [""] * count)),
        "English text": english["text"],
        **of("unet", "branch", step=step),
        **of(
            "vae",
            whole=decode,
            sliced=partial(decode, sliced=True),
            tiled=partial(decode, sliced=True, tiled=True),
        ),
    }


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
