"""Where pictures and captions come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
    wrong_captions: Fraction = 0.0

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
    background: str = "white"

    @field_validator("background")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(value)
        except ValueError:
            raise ValueError("give a colour by its name or as #rrggbb, such as white or #808080") from None
        return value


class FolderConfig(PicturesConfig):
    """A folder of pictures with ``metadata.jsonl`` (see ``bdm.data.folder.FolderSource``)."""

    kind: Literal["folder"]
    path: Path
    caption: str = "text"
    validation: Annotated[int, Field(ge=1)] = 64


class ShardedConfig(PicturesConfig):
    """What the sources in shards share.

    With ``index`` they are read through one (see ``bdm.data.indexed.IndexedSource``), and ``partitions``,
    ``local`` and ``local_gb`` count.
    """

    urls: str | tuple[str, ...]
    captions: dict[str, Annotated[float, Field(gt=0)]] | None = None
    validation_shards: PositiveInt = 1
    cache: Path | None = None
    shard_limit: Fraction = 0.05
    index: Path | None = None
    partitions: PositiveInt = 64
    local: Path | None = None
    local_gb: Annotated[float, Field(gt=0)] = 50.0


class ShardsConfig(ShardedConfig):
    """Tar shards of img2dataset or webdataset (see ``bdm.data.shards.ShardSource``)."""

    kind: Literal["shards"]


class ParquetConfig(ShardedConfig):
    """Parquet files (see ``bdm.data.parquet.ParquetSource``)."""

    kind: Literal["parquet"]
    picture: str = "image"


class PreparedConfig(Strict):
    """What ``bdm prepare`` wrote (see ``bdm.data.prepared.PreparedSource``).

    With ``partitions`` it is read by machines as an indexed corpus is (see
    ``bdm.data.partitioned.PartitionedPrepared``), and ``local`` and ``local_gb`` count.
    """

    kind: Literal["prepared"]
    path: str
    min_score: float | None = None
    duplicates: bool = False
    partitions: PositiveInt | None = None
    local: Path | None = None
    local_gb: Annotated[float, Field(gt=0)] = 50.0

    @model_validator(mode="after")
    def _in_partitions(self) -> PreparedConfig:
        if self.local is not None and self.partitions is None:
            raise ValueError("local keeps the shards of a machine's partitions; give partitions, such as 64")
        return self


class ModuleDataConfig(Strict):
    """Data of another package: ``target`` is "package.module:Class" (see ``bdm.training.recipes.module``),
    ``arguments`` its own.
    """

    kind: Literal["module"]
    target: str
    arguments: dict[str, Any] | None = None


RawConfig = EmojiConfig | FolderConfig | ShardsConfig | ParquetConfig


class MixPartConfig(Strict):
    """One of the corpora of a mix, and how often its samples are drawn, relative to the others'."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    data: Annotated[RawConfig | PreparedConfig, Field(discriminator="kind")]


class MixConfig(Strict):
    """Several corpora as one, all of raw pictures or all prepared (see ``bdm.data.mixing.MixedSource``)."""

    kind: Literal["mix"]
    parts: Annotated[tuple[MixPartConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _alike(self) -> MixConfig:
        raw = self._raw()
        if raw and len(raw) < len(self.parts):
            raise ValueError("some of its parts are prepared and others not; give all the same")
        if len({(data.size, _buckets(data)) for data in raw}) > 1:
            raise ValueError("its parts have different size or buckets; give all the same")
        return self

    def _raw(self) -> list[RawConfig]:
        return [part.data for part in self.parts if not isinstance(part.data, PreparedConfig)]

    @property
    def prepared(self) -> bool:
        """Whether its parts are."""
        return not self._raw()

    @property
    def size(self) -> int:
        """Side of the pictures; 0 of prepared parts."""
        return self._raw()[0].size if self._raw() else 0

    @property
    def buckets(self) -> BucketsConfig | None:
        """Those of all parts; prepared ones have their own."""
        return _buckets(self._raw()[0]) if self._raw() else None

    @property
    def flip(self) -> float:
        """The largest share of mirrored uses."""
        return max((data.flip for data in self._raw()), default=0.0)


def _buckets(data: RawConfig) -> BucketsConfig | None:
    """The emoji are all squares."""
    return None if isinstance(data, EmojiConfig) else data.buckets


DataConfig = Annotated[RawConfig | PreparedConfig | ModuleDataConfig | MixConfig, Field(discriminator="kind")]


class IndexConfig(BaseModel):
    """The data of a run or of its preparation, for ``bdm index``; what else the file says is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: DataConfig
    unreadable_limit: Fraction = 0.05
