"""What is trained, and with which loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .reading import Fraction, PositiveInt, Strict


class AutoencoderConfig(Strict):
    """Train an ``AutoencoderKL``; ``model`` holds the arguments of its constructor."""

    kind: Literal["autoencoder"]
    model: dict[str, Any]
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6


class ContrastiveConfig(Strict):
    """Train a text and a picture encoder contrastively, as CLIP.

    The text encoder is what the other recipes use.
    """

    kind: Literal["contrastive"]
    architecture: Literal["clip", "chinese_clip"]
    text: dict[str, Any]
    vision: dict[str, Any]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    uniformity: Annotated[float, Field(ge=0)] = 1.0
    thumbnail: Annotated[float, Field(ge=0)] = 2.0


class DenoisingConfig(Strict):
    """What both denoising recipes share."""

    empty_caption: Fraction = 0.1
    timesteps: Literal["uniform", "high_noise"] = "uniform"
    loss_weight: Literal["none", "min_snr", "velocity"] = "none"
    prediction: Literal["epsilon", "v_prediction"] | None = None
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    cache: bool = False
    grid_prompts: tuple[str, ...] = ()
    grid_guidance: float = 4.0


class BackboneConfig(DenoisingConfig):
    """Train a UNet beside a frozen VAE and text encoder (a Stable Diffusion of one's own), from scratch or
    from ``backbone``.
    """

    kind: Literal["backbone"]
    vae: str
    text_encoder: str
    unet: dict[str, Any] | None = None
    backbone: str | None = None

    @model_validator(mode="after")
    def _one(self) -> BackboneConfig:
        if (self.unet is None) == (self.backbone is None):
            raise ValueError(
                "give unet, the arguments of a new one, or backbone, whose UNet is trained further: one of"
                " the two"
            )
        return self


class PoolFileConfig(Strict):
    """A file of a pool, and the words that it is told in English."""

    file: str
    words: str = ""


class PoolConfig(Strict):
    """Backbones that a branch meets in training (see ``bdm.training.recipes.pool.BackbonePool``)."""

    files: tuple[PoolFileConfig | str, ...] = ()
    strength: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = (0.5, 1.0)
    together: PositiveInt = 2
    rank: Annotated[int, Field(ge=0)] = 0
    random_strength: Annotated[float, Field(gt=0)] = 0.3
    share: Fraction = 0.75
    target: Literal["caption", "shift", "data"] = "caption"

    @model_validator(mode="after")
    def _something(self) -> PoolConfig:
        if not self.files and not self.rank:
            raise ValueError(
                "it has neither files nor random changes: give files, or a rank above 0, or leave pool out"
            )
        if self.strength[0] > self.strength[1]:
            raise ValueError(f"strength {list(self.strength)}: give the smaller bound first")
        return self


class BranchConfig(DenoisingConfig):
    """Train the branch of a Bridge Diffusion Model.

    The backbone is frozen and gets the empty English prompt.
    """

    kind: Literal["branch"]
    backbone: str
    native_text_encoder: str
    branch: str | None = None
    shuffle_captions: bool = False
    pool: PoolConfig | None = None
    bilingual: Fraction = 0.0
    frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


class CommunityConfig(DenoisingConfig):
    """What the recipes of community plug-ins share.

    They train on the backbone alone, with English captions.
    """

    backbone: str
    trigger: str = ""


class CheckpointConfig(CommunityConfig):
    """Fine-tune the backbone's UNet; writes an original-layout single file."""

    kind: Literal["checkpoint"]


class AdapterConfig(CommunityConfig):
    """The size of a LoRA."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 8


class LoraConfig(AdapterConfig):
    """Train a LoRA on the backbone's UNet; writes kohya's names."""

    kind: Literal["lora"]


class LcmLoraConfig(AdapterConfig):
    """Distil guided sampling into a LoRA for a few steps (LCM-LoRA); writes kohya's names."""

    kind: Literal["lcm_lora"]
    guidance: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (2.0, 3.0)
    solver_steps: Annotated[int, Field(ge=2, le=1000)] = 50


class EmbeddingConfig(CommunityConfig):
    """Learn a word's vectors (textual inversion); writes A1111's form."""

    kind: Literal["embedding"]
    trigger: Annotated[str, Field(min_length=1)] = "mood"
    vectors: Annotated[int, Field(ge=1, le=75)] = 2
    initial: str = "background"


class ControlNetConfig(CommunityConfig):
    """Train a ControlNet on the edges of the pictures."""

    kind: Literal["controlnet"]
    widths: tuple[PositiveInt, ...] = (16, 32, 96)

    @model_validator(mode="after")
    def _pictures(self) -> ControlNetConfig:
        if self.cache:
            raise ValueError(
                "cache: true keeps no pictures, and a ControlNet's condition is made from them; set cache:"
                " false"
            )
        return self


class JudgeConfig(Strict):
    """Train the classifier that scores generated pictures; it knows nothing of the generator."""

    kind: Literal["judge"]
    width: PositiveInt = 32
    architecture: Literal["convolutional", "transformer"] = "convolutional"


RecipeConfig = Annotated[
    AutoencoderConfig
    | ContrastiveConfig
    | BackboneConfig
    | BranchConfig
    | CheckpointConfig
    | LoraConfig
    | LcmLoraConfig
    | EmbeddingConfig
    | ControlNetConfig
    | JudgeConfig,
    Field(discriminator="kind"),
]
