"""Training runs and the preparation of their data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from .data import DataConfig, MixConfig, PicturesConfig, RawConfig
from .reading import Fraction, MixedPrecision, PositiveInt, Strict
from .recipe import LatentConfig, RecipeConfig, StartConfig

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    """The optimizer, its schedule and the averaged weights.

    ``batch_size`` is global: over all processes and accumulation.
    """

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    #: Factors of the learning rate by pattern of the parameter's name, such as {"branch.controlnet_*": 10}.
    rate_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.999
    #: Where the average is kept: beside the weights, or in the CPU's memory.
    ema_device: Literal["weights", "cpu"] = "weights"
    accumulation: PositiveInt = 1
    mixed_precision: MixedPrecision = "no"
    checkpointing: tuple[str, ...] = ()
    compile: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}"
            )
        if self.rate_factors and self.name == "prodigy":
            raise ValueError(
                "rate_factors: prodigy finds one step size for all parameters; leave them out, or use adamw"
            )
        return self


class EvaluationConfig(Strict):
    """How a run looks at itself on one's own texts and pictures (see ``bdm.training.own_data``).

    ``prompts`` are texts, or a prompt file; captions of validation examples without. ``best`` is the figure
    by which the best state is kept.
    """

    every: PositiveInt = 5000
    prompts: tuple[str, ...] | str = ()
    count: PositiveInt = 64
    guidance: float = 4.0
    scorer: str | None = None
    features: str | None = None
    best: Literal["clip_score", "fid", "kid"] | None = None

    @model_validator(mode="after")
    def _possible(self) -> EvaluationConfig:
        if not self.scorer and not self.features:
            raise ValueError("give scorer, a whole Chinese CLIP, or features, for FID and KID")
        needed = {"clip_score": self.scorer, "fid": self.features, "kid": self.features}
        if self.best and not needed[self.best]:
            name = "scorer" if self.best == "clip_score" else "features"
            raise ValueError(f"best is {self.best}, which nothing measures; give {name}")
        return self


class InitConfig(Strict):
    """Where a run begins that is the next stage of another: with the weights of its last state (see
    ``bdm.training.beginning``).

    ``from`` is the folder of a run, or one of its states; ``moments``, ``averages`` and ``position`` say what
    goes on beside the weights: the optimizer's moments, the average and the place in the order of the data.
    """

    run: Annotated[str, Field(alias="from")]
    weights: Literal["averaged", "raw"] = "averaged"
    moments: bool = False
    averages: bool = False
    position: bool = False

    @model_serializer(mode="wrap")
    def _as_written(self, plain: Any) -> dict[str, Any]:
        written = plain(self)
        return {"from": written.pop("run"), **written}


class ProfileConfig(Strict):
    """Steps that are looked at operator by operator, ``first`` steps after a start (see
    ``bdm.training.profiling``).
    """

    first: Annotated[int, Field(ge=0)] = 10
    steps: PositiveInt = 3


class RunConfig(Strict):
    """One training run: what is trained (recipe) on what (data), how (optimizer) and where it goes (out)."""

    out: Path
    recipe: RecipeConfig
    data: DataConfig
    optimizer: OptimizerConfig
    init: InitConfig | None = None
    seed: int = 0
    threads: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    #: Seconds that a process waits for the others; hours after which the run saves its state and stops.
    collective_timeout: Annotated[float, Field(gt=0)] | None = None
    time_limit: Annotated[float, Field(gt=0)] | None = None
    #: What a device can do, in 10^12 operations a second, by which model FLOP utilisation is told.
    peak_tflops: Annotated[float, Field(gt=0)] | Literal["measured"] | None = None
    profile: ProfileConfig | None = None
    evaluation: EvaluationConfig | None = None
    trackers: tuple[Literal["tensorboard", "swanlab", "wandb"], ...] = ("tensorboard",)
    log_every: PositiveInt = 20
    validate_every: PositiveInt = 500
    grid_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_every: Annotated[int, Field(ge=0)] = 0
    #: Folder of the states, or its URL, if it is not ``out/states``.
    states: str | None = None
    #: Whether training goes on while a state is written, which takes its size in memory; whether each of
    #: several processes writes a part of it: where weights are split if None.
    background_states: bool = True
    sharded_states: bool | None = None
    skip_limit: Annotated[int, Field(ge=0)] = 20
    unreadable_limit: Fraction = 0.05
    read_limit: Fraction = 0.05

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.recipe.kind == "judge" and self.data.kind != "emoji":
            raise ValueError(
                f"data.kind is {self.data.kind!r}; the judge knows the emoji world only: use kind: emoji"
            )
        if self._prepared() and self.recipe.kind in ("autoencoder", "contrastive", "controlnet"):
            raise ValueError(
                f"recipe.kind {self.recipe.kind!r} needs pictures, and prepared shards hold none: use the raw"
                " data"
            )
        if isinstance(self.recipe, LatentConfig) and self.recipe.cache:
            if self._prepared():
                raise ValueError("recipe.cache: prepared shards are a cache already; set cache: false")
            if getattr(self.data, "flip", 0) or (
                isinstance(self.data, PicturesConfig | MixConfig) and self.data.buckets
            ):
                raise ValueError(
                    "recipe.cache keeps square pictures as they are; set cache: false, or leave out buckets"
                    " and flip"
                )
        start = getattr(self.recipe, "start", None)
        if isinstance(start, StartConfig) and start.moments and self.optimizer.name != "adamw":
            raise ValueError(
                f"recipe.start.moments: only adamw goes on with an earlier run's, and optimizer.name is"
                f" {self.optimizer.name}; set moments: false"
            )
        if self.recipe.kind == "contrastive" and self.optimizer.accumulation > 1:
            raise ValueError(
                "optimizer.accumulation: a contrastive loss compares a batch's pairs with each other; set it"
                " to 1"
            )
        if (
            self.recipe.kind == "contrastive"
            and isinstance(self.data, PicturesConfig | MixConfig)
            and self.data.buckets
        ):
            raise ValueError("data.buckets: the picture encoder reads one size; leave them out")
        return self

    def _prepared(self) -> bool:
        return self.data.kind == "prepared" or (isinstance(self.data, MixConfig) and self.data.prepared)

    @model_validator(mode="after")
    def _one_beginning(self) -> RunConfig:
        for name in ("start", "branch"):
            if self.init and getattr(self.recipe, name, None) is not None:
                raise ValueError(
                    f"init and recipe.{name} both say where the weights begin; give one of the two"
                )
        if self.init and self.init.moments and self.optimizer.name != "adamw":
            raise ValueError(
                f"init.moments: only adamw goes on with an earlier run's, and optimizer.name is"
                f" {self.optimizer.name}; set moments: false"
            )
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
    mixed_precision: MixedPrecision = "no"
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
        if self.data.flip:
            raise ValueError("data.flip: prepared pictures cannot be mirrored any more; leave it out")
        return self


class VocabularyConfig(Strict):
    """Training captions -> a SentencePiece vocabulary (see ``bdm.prepare.vocabulary``).

    ``pieces`` is how many there are at most; few captions hold fewer.
    """

    out: Path
    data: DataConfig
    captions: Literal["training"] = "training"
    pieces: Annotated[int, Field(ge=4, le=1_000_000)] = 8000
    positions: Annotated[int, Field(ge=2, le=100_000)] = 77

    @field_validator("captions", mode="before")
    @classmethod
    def _training_alone(cls, value: Any) -> Any:
        if value != "training":
            raise ValueError(
                "a vocabulary is trained on the training captions alone, so that validation captions tell"
                " something of it; leave it out"
            )
        return value

    @model_validator(mode="after")
    def _none_held_out(self) -> VocabularyConfig:
        mixed = [part.data for part in self.data.parts] if isinstance(self.data, MixConfig) else [self.data]
        for data in mixed:
            if data.kind == "emoji" and data.held_out != "without":
                raise ValueError(
                    f"data.held_out is {data.held_out!r}: those captions are validation's, which no"
                    " vocabulary is trained on; leave it out"
                )
        return self
