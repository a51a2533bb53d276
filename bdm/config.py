"""Strict run configurations: YAML files plus ``key=value`` overrides.

Unknown keys and impossible combinations are refused before anything heavy happens. Only builders read these classes;
models and functions take plain arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError

Config = TypeVar("Config", bound=BaseModel)
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base of all configurations: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldConfig(Strict):
    """Which emoji take part (see ``bdm.data.emoji.World``)."""

    concepts: int = 640
    seed: int = 0


class EmojiConfig(Strict):
    """The emoji world (see ``bdm.data.emoji.EmojiSource``)."""

    kind: Literal["emoji"]
    world: WorldConfig = WorldConfig()
    language: Literal["zh", "en", "ja"] = "zh"
    size: PositiveInt = 32
    variants: Annotated[int, Field(ge=2)] = 4
    groups: tuple[Literal["native", "different", "shared"], ...] = ("native", "different", "shared")
    looks: tuple[Literal["twemoji", "openmoji"], ...] | None = None
    treatments: tuple[Literal["plain", "grey"], ...] = ("plain",)
    colours: tuple[Literal["white", "red", "orange", "yellow", "green", "blue", "purple", "pink"], ...] | None = None
    name_colours: bool = True
    limit: Annotated[int, Field(ge=0)] = 0
    held_out: Literal["without", "only", "all"] = "without"


class BucketsConfig(Strict):
    """Aspect-ratio buckets (see ``bdm.data.buckets``); ``buckets: {}`` takes Stable Diffusion's."""

    step: PositiveInt = 64
    max_aspect: Annotated[float, Field(ge=1)] = 2.0


class PicturesConfig(Strict):
    """What the sources of raw pictures share (see ``bdm.data.pictures.PictureRules``)."""

    size: PositiveInt = 512
    min_side: Annotated[int, Field(ge=0)] = 0
    max_aspect: Annotated[float, Field(ge=0)] = 0.0
    min_scores: dict[str, float] | None = None
    max_caption: PositiveInt = 1000
    buckets: BucketsConfig | None = None
    flip: Fraction = 0.0


class FolderConfig(PicturesConfig):
    """A folder of pictures with ``metadata.jsonl`` (see ``bdm.data.folder.FolderSource``)."""

    kind: Literal["folder"]
    path: Path
    caption: str = "text"
    validation: Annotated[int, Field(ge=1)] = 64


class ShardsConfig(PicturesConfig):
    """Tar shards of img2dataset or webdataset (see ``bdm.data.shards.ShardSource``)."""

    kind: Literal["shards"]
    urls: str | tuple[str, ...]
    captions: dict[str, Annotated[float, Field(gt=0)]] | None = None
    validation_shards: PositiveInt = 1
    cache: Path | None = None


class ParquetConfig(PicturesConfig):
    """Parquet files (see ``bdm.data.parquet.ParquetSource``)."""

    kind: Literal["parquet"]
    urls: str | tuple[str, ...]
    picture: str = "image"
    captions: dict[str, Annotated[float, Field(gt=0)]] | None = None
    validation_shards: PositiveInt = 1
    cache: Path | None = None


class PreparedConfig(Strict):
    """What ``bdm prepare`` wrote (see ``bdm.data.prepared.PreparedSource``)."""

    kind: Literal["prepared"]
    path: str
    min_score: float | None = None
    duplicates: bool = False


RawConfig = EmojiConfig | FolderConfig | ShardsConfig | ParquetConfig
DataConfig = Annotated[RawConfig | PreparedConfig, Field(discriminator="kind")]


class AutoencoderConfig(Strict):
    """Train an ``AutoencoderKL``; ``model`` holds the arguments of its constructor."""

    kind: Literal["autoencoder"]
    model: dict[str, Any]
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6


class ContrastiveConfig(Strict):
    """Train a text and a picture encoder contrastively, as CLIP; the text encoder is what the other recipes use."""

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
    """Train a UNet from scratch beside a frozen VAE and text encoder (a Stable Diffusion of one's own)."""

    kind: Literal["backbone"]
    vae: str
    text_encoder: str
    unet: dict[str, Any]


class BranchConfig(DenoisingConfig):
    """Train the branch of a Bridge Diffusion Model; the backbone is frozen and gets the empty English prompt."""

    kind: Literal["branch"]
    backbone: str
    native_text_encoder: str
    branch: str | None = None
    shuffle_captions: bool = False
    frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


class CommunityConfig(DenoisingConfig):
    """What the recipes of community plug-ins share; they train on the backbone alone, with English captions."""

    backbone: str
    trigger: str = ""


class CheckpointConfig(CommunityConfig):
    """Fine-tune the backbone's UNet; writes an original-layout single file."""

    kind: Literal["checkpoint"]


class LoraConfig(CommunityConfig):
    """Train a LoRA on the backbone's UNet; writes kohya's names."""

    kind: Literal["lora"]
    rank: PositiveInt = 8
    alpha: PositiveInt = 8


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
            raise ValueError("cache: true keeps no pictures, and a ControlNet's condition is made from them; set cache: false")
        return self


class JudgeConfig(Strict):
    """Train the classifier that scores generated pictures; it knows nothing of the generator."""

    kind: Literal["judge"]
    width: PositiveInt = 32


RecipeConfig = Annotated[
    AutoencoderConfig
    | ContrastiveConfig
    | BackboneConfig
    | BranchConfig
    | CheckpointConfig
    | LoraConfig
    | EmbeddingConfig
    | ControlNetConfig
    | JudgeConfig,
    Field(discriminator="kind"),
]


class OptimizerConfig(Strict):
    """The optimizer, its schedule and the averaged weights. ``batch_size`` is global: over all processes and accumulation."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.999
    accumulation: PositiveInt = 1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    checkpointing: tuple[str, ...] = ()
    compile: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}")
        return self


class RunConfig(Strict):
    """One training run: what is trained (recipe) on what (data), how (optimizer) and where it goes (out)."""

    out: Path
    recipe: RecipeConfig
    data: DataConfig
    optimizer: OptimizerConfig
    seed: int = 0
    threads: int | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    trackers: tuple[Literal["tensorboard", "swanlab", "wandb"], ...] = ("tensorboard",)
    log_every: PositiveInt = 20
    validate_every: PositiveInt = 500
    grid_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_every: Annotated[int, Field(ge=0)] = 0
    skip_limit: Annotated[int, Field(ge=0)] = 20
    unreadable_limit: Fraction = 0.05

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.recipe.kind == "judge" and self.data.kind != "emoji":
            raise ValueError(f"data.kind is {self.data.kind!r}; the judge knows the emoji world only: use kind: emoji")
        if self.data.kind == "prepared" and self.recipe.kind in ("autoencoder", "contrastive", "controlnet"):
            raise ValueError(f"recipe.kind {self.recipe.kind!r} needs pictures, and prepared shards hold none: use the raw data")
        if isinstance(self.recipe, DenoisingConfig) and self.recipe.cache:
            if self.data.kind == "prepared":
                raise ValueError("recipe.cache: prepared shards are a cache already; set cache: false")
            if isinstance(self.data, PicturesConfig) and (self.data.buckets or self.data.flip):
                raise ValueError("recipe.cache keeps square pictures as they are; set cache: false, or leave out buckets and flip")
        if self.recipe.kind == "contrastive" and isinstance(self.data, PicturesConfig) and self.data.buckets:
            raise ValueError("data.buckets: the picture encoder reads one size; leave them out")
        return self


class PrepareConfig(Strict):
    """Raw pictures -> prepared shards (see ``bdm.prepare``)."""

    out: Path
    data: Annotated[RawConfig, Field(discriminator="kind")]
    vae: str
    native_text_encoder: str | None = None
    text: Literal["features", "ids", "none"] = "features"
    scorer: str | None = None
    scorer_mask: bool = True
    min_score: float | None = None
    dtype: Literal["float16", "float32"] = "float16"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    batch_size: PositiveInt = 32
    samples_per_shard: PositiveInt = 5000
    workers: Annotated[int, Field(ge=0)] = 0
    threads: PositiveInt | None = None
    unreadable_limit: Fraction = 0.05

    @model_validator(mode="after")
    def _possible(self) -> PrepareConfig:
        if self.text != "none" and self.native_text_encoder is None:
            raise ValueError(f"text: {self.text} needs native_text_encoder; name one, or set text: none")
        if self.min_score is not None and self.scorer is None:
            raise ValueError("min_score needs scorer, a folder or hub name of a whole Chinese CLIP")
        if isinstance(self.data, PicturesConfig) and self.data.flip:
            raise ValueError("data.flip: prepared pictures cannot be mirrored any more; leave it out")
        return self


class PluginFilesConfig(Strict):
    """The plug-ins whose combinations are evaluated (see ``bdm.evaluate.combinations``), and their trigger words."""

    checkpoint: str
    lora: str
    controlnet: str
    embedding: str
    lora_trigger: str
    embedding_colour: str


class EvaluateConfig(Strict):
    """The evaluation in the emoji world (see ``bdm.evaluate.report``); with ``plugins`` that of their combinations."""

    model: str
    judge: str
    out: Path
    shuffled_branch: str | None = None
    world: WorldConfig = WorldConfig()
    sampler: str | None = None
    steps: PositiveInt = 12
    guidance: float = 4.0
    batch: PositiveInt = 32
    controls: PositiveInt = 64
    seed: int = 0
    plugins: PluginFilesConfig | None = None


class BenchConfig(Strict):
    """What all comparisons with a peer share (see ``bdm.bench``); results that differ by more than ``tolerance`` are not timed."""

    out: Path
    pairs: PositiveInt = 5
    warm_up: Annotated[int, Field(ge=0)] = 1
    threads: PositiveInt | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tolerance: Annotated[float, Field(gt=0)] = 3e-5
    seed: int = 0


class BenchModelConfig(BenchConfig):
    """Random weights of SD1.5's size (``unet`` and ``vae`` hold what differs), or a pipeline folder's."""

    model: Path | None = None
    unet: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    native_width: PositiveInt = 1024
    latents: PositiveInt = 64
    batch: PositiveInt = 1


class BenchInferConfig(BenchModelConfig):
    """Guided drawing, beside diffusers' UNet and ControlNet on the doubled batch (see ``bdm.bench.infer``)."""

    kind: Literal["infer"]
    peers: tuple[Literal["diffusers", "diffusers compiled"], ...] = ("diffusers",)
    steps: PositiveInt = 1
    guidance: Annotated[float, Field(gt=1)] = 7.5
    decode: bool = False


class BenchTrainConfig(BenchModelConfig):
    """A training step from cached moments and text, beside diffusers' ControlNet recipe (see ``bdm.bench.train``)."""

    kind: Literal["train"]
    peers: tuple[Literal["recipe", "recipe with caches"], ...] = ("recipe", "recipe with caches")
    text: dict[str, Any] = {}
    native_text: dict[str, Any] = {}


class BenchLoadConfig(BenchConfig):
    """Reading a single file of SD1.5's size, beside diffusers (see ``bdm.bench.load``)."""

    kind: Literal["load"]
    unet: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    text: dict[str, Any] = {}


#: The configuration of each ``bdm bench`` command.
BENCHES: dict[str, type[BenchConfig]] = {"infer": BenchInferConfig, "train": BenchTrainConfig, "load": BenchLoadConfig}


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=value`` override to a nested dictionary; the value is read as YAML."""
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"override {override!r} is not of the form key=value, such as optimizer.steps=100")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a group of keys")
    tree[last] = yaml.safe_load(text)


def read_config(path: str | Path, overrides: Sequence[str], schema: type[Config]) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and check the result.

    Raises:
        UserError: file missing, not YAML, unknown keys or values that are not allowed; every problem in one message.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file, such as configs/quickstart.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds {type(tree).__name__}, not a mapping of keys to values")
    for override in overrides:
        _set(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {_explain(e)}" for e in error.errors())
        raise UserError(f"config {path}: {problems}") from None


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key (value {error['input']!r}); remove it or correct its spelling"
    return f"{error['msg'].removeprefix('Value error, ')} (seen: {str(error['input'])[:80]})"
