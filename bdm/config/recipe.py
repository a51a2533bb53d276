"""What is trained, and with which loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

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


class LatentConfig(Strict):
    """What all recipes share that show noisy latents to a UNet."""

    empty_caption: Fraction = 0.1
    timesteps: Literal["uniform", "high_noise"] = "uniform"
    cache: bool = False
    grid_prompts: tuple[str, ...] = ()
    grid_guidance: float = 4.0


class DenoisingConfig(LatentConfig):
    """What all denoising recipes share."""

    loss_weight: Literal["none", "min_snr", "velocity"] = "none"
    prediction: Literal["epsilon", "v_prediction"] | None = None
    offset_noise: Annotated[float, Field(ge=0)] = 0.0


class FreshEncoderConfig(Strict):
    """An untrained native text encoder (see ``bdm.training.recipes.native_encoder.fresh_encoder``)."""

    vocabulary: str
    model: dict[str, Any] | None = None
    chunk_length: PositiveInt = 76


class StartConfig(Strict):
    """An earlier run that is gone on from (see ``bdm.training.recipes.native_encoder.Start``)."""

    run: str
    weights: Literal["averaged", "raw"] = "averaged"
    moments: bool = False


#: Width of a head of a connector's transformer (``bdm.text.connector.HEAD_WIDTH``).
CONNECTOR_HEAD = 64


class ConnectorConfig(Strict):
    """A fresh connector (see ``bdm.text.connector.Connector``)."""

    hidden: Annotated[int, Field(ge=0)] = 0
    depth: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _whole_heads(self) -> ConnectorConfig:
        if self.depth and (not self.hidden or self.hidden % CONNECTOR_HEAD):
            raise ValueError(
                f"depth is {self.depth} and hidden {self.hidden}; a depth needs a hidden that is a multiple"
                f" of {CONNECTOR_HEAD}"
            )
        return self


class TextSlotConfig(Strict):
    """What takes the text's place in a latent diffusion model, and where it begins."""

    backbone: str
    native_text_encoder: str | FreshEncoderConfig | None = None
    start: str | StartConfig | None = None
    connector: ConnectorConfig | None = None

    @model_validator(mode="after")
    def _one_beginning(self) -> TextSlotConfig:
        if (self.native_text_encoder is None) == (self.start is None):
            raise ValueError(
                "give native_text_encoder, or start, the folder of an earlier run, whose text encoder and"
                " UNet are gone on with: one of the two"
            )
        fresh = isinstance(self.native_text_encoder, FreshEncoderConfig)
        if fresh and "text_encoder" not in getattr(self, "train", ()):
            raise ValueError("the text encoder is untrained, and train does not name it; add text_encoder")
        return self


def _checked_parts(train: tuple[str, ...]) -> tuple[str, ...]:
    if not train or len(set(train)) < len(train):
        raise ValueError(f"train is {list(train)}; name at least one part, each once")
    if {"unet", "cross_attention"} <= set(train):
        raise ValueError("train names unet and cross_attention, which is a part of it; name one of the two")
    return train


class NativeTextConfig(DenoisingConfig, TextSlotConfig):
    """Train what reads native captions in the text's place, by denoising (see
    ``bdm.training.recipes.native_text``).
    """

    kind: Literal["native_text"]
    train: Annotated[
        tuple[Literal["text_encoder", "connector", "unet", "cross_attention"], ...],
        AfterValidator(_checked_parts),
    ] = ("text_encoder",)
    attention: Literal["keys_values", "all"] = "keys_values"
    shuffle_captions: bool = False

    @model_validator(mode="after")
    def _first_the_text(self) -> NativeTextConfig:
        fresh = isinstance(self.native_text_encoder, FreshEncoderConfig)
        if fresh and {"unet", "cross_attention"} & set(self.train):
            raise ValueError(
                f"train is {', '.join(self.train)} and the text encoder is untrained: the UNet would forget"
                " what it knows while that learns; train the text encoder alone first, and name that run as"
                " start"
            )
        return self


class AlignConfig(LatentConfig, TextSlotConfig):
    """Train what reads native captions until a UNet makes the same of it as of their English (see
    ``bdm.training.recipes.align``).
    """

    kind: Literal["align"]
    train: Annotated[tuple[Literal["text_encoder", "connector"], ...], AfterValidator(_checked_parts)] = (
        "text_encoder",
    )
    match: Literal["attention", "pooled", "position"] = "attention"
    shuffle_captions: bool = False


class BackboneConfig(DenoisingConfig):
    """Train a UNet beside a frozen VAE and text encoder (a Stable Diffusion of one's own), from scratch or
    from ``backbone``.
    """

    kind: Literal["backbone"]
    vae: str
    text_encoder: str | None = None
    native_text_encoder: str | FreshEncoderConfig | None = None
    train_text_encoder: bool = False
    shuffle_captions: bool = False
    empty_decoder: Fraction = 0.0
    unet: dict[str, Any] | None = None
    backbone: str | None = None

    @model_validator(mode="after")
    def _one_language(self) -> BackboneConfig:
        if (self.text_encoder is None) == (self.native_text_encoder is None):
            raise ValueError(
                "give text_encoder, for English captions, or native_text_encoder, for native ones: one of the"
                " two"
            )
        if self.train_text_encoder and self.native_text_encoder is None:
            raise ValueError("train_text_encoder trains a native_text_encoder; give one")
        if self.shuffle_captions and self.native_text_encoder is None:
            raise ValueError("shuffle_captions is the control of a native_text_encoder; give one")
        if self.empty_decoder and self.text_encoder is None:
            raise ValueError("empty_decoder is of an English text_encoder; leave it out with a native one")
        if isinstance(self.native_text_encoder, FreshEncoderConfig) and not self.train_text_encoder:
            raise ValueError("the native_text_encoder is untrained; set train_text_encoder: true")
        return self

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
    fresh_text: bool = False
    shuffle_captions: bool = False
    pool: PoolConfig | None = None
    bilingual: Fraction = 0.0
    distill: bool = False
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


class ModuleConfig(Strict):
    """A recipe of another package: ``target`` is "package.module:Class" (see
    ``bdm.training.recipes.module``), ``arguments`` its own.
    """

    kind: Literal["module"]
    target: str
    arguments: dict[str, Any] | None = None


RecipeConfig = Annotated[
    AutoencoderConfig
    | ContrastiveConfig
    | BackboneConfig
    | BranchConfig
    | NativeTextConfig
    | AlignConfig
    | CheckpointConfig
    | LoraConfig
    | LcmLoraConfig
    | EmbeddingConfig
    | ControlNetConfig
    | JudgeConfig
    | ModuleConfig,
    Field(discriminator="kind"),
]
