"""Where pictures and captions come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from .reading import Fraction, PositiveInt, Strict

#: The backgrounds of the emoji world (the keys of ``bdm.emoji.world.COLOURS``).
Colour = Literal["white", "red", "orange", "yellow", "green", "blue", "purple", "pink"]
#: How its pictures are treated (``bdm.emoji.world.TREATMENTS``).
Treatment = Literal["plain", "grey", "outlined", "shadowed", "sealed", "framed", "dotted", "outlined_sealed"]

#: The languages of its captions (``bdm.emoji.world.LANGUAGES``).
Language = Literal["zh", "en", "ja", "ko", "de", "es", "fr", "it", "pt", "ru", "tr", "id", "ar", "fa"]


class WorldConfig(Strict):
    """Which emoji take part (see ``bdm.emoji.world.World``)."""

    concepts: int = 640
    seed: int = 0


class EmojiConfig(Strict):
    """The emoji world (see ``bdm.emoji.world.EmojiSource``)."""

    kind: Literal["emoji"]
    world: WorldConfig = WorldConfig()
    language: Language | tuple[Language, ...] = "zh"
    size: PositiveInt = 64
    variants: Annotated[int, Field(ge=3)] = 5
    groups: tuple[Literal["native", "different", "shared"], ...] = ("native", "different", "shared")
    looks: tuple[Literal["twemoji", "openmoji"], ...] | None = None
    treatments: tuple[Treatment, ...] = ("plain",)
    colours: tuple[Colour, ...] | None = None
    name_colours: bool = True
    limit: Annotated[int, Field(ge=0)] = 0
    held_out: Literal["without", "only", "all"] = "without"
    flip: Fraction = 0.0
    translations: bool = False

    @field_validator("language", mode="before")
    @classmethod
    def _known_languages(cls, value: Any) -> Any:
        given, known = [value] if isinstance(value, str) else value, get_args(Language)
        listed = isinstance(given, list | tuple) and all(one in known for one in given)
        if not listed or not 1 <= len(given) == len(set(given)):
            raise ValueError(f"give one or several of {', '.join(known)}, each once")
        return value


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
    english: str | None = None


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


class ModuleDataConfig(Strict):
    """Data of another package: ``target`` is "package.module:Class" (see ``bdm.training.recipes.module``),
    ``arguments`` its own.
    """

    kind: Literal["module"]
    target: str
    arguments: dict[str, Any] | None = None


RawConfig = EmojiConfig | FolderConfig | ShardsConfig | ParquetConfig
DataConfig = Annotated[RawConfig | PreparedConfig | ModuleDataConfig, Field(discriminator="kind")]
