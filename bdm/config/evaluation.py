"""Evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import UserError
from .data import Colour, Language, WorldConfig
from .filtering import FilterConfig
from .reading import Fraction, PositiveInt, Strict, read_config, read_tree


class PluginFilesConfig(Strict):
    """The plug-ins whose combinations are evaluated (see ``bdm.evaluate.combinations``), their trigger words
    and strengths. Without ``pairs`` those combinations are left out that no ratio needs.
    """

    checkpoint: str
    lora: str
    controlnet: str
    embedding: str
    lora_trigger: str
    embedding_colour: Colour
    lora_strength: float = 1.0
    controlnet_strength: float = 1.0
    pairs: bool = True


class AblationRowConfig(Strict):
    """A way to train or to guide a branch, beside others (see ``bdm.evaluate.ablation``).

    ``composed`` gives the English prompts a strength of their own.
    """

    title: str = ""
    branch: str
    composed: bool = False


class ModeConfig(Strict):
    """An approximate mode (see ``bdm.Approximation``), or fewer steps.

    What is None is as in the exact one.
    """

    steps: PositiveInt | None = None
    guidance: float | None = None
    sampler: str | None = None
    lora: str | None = None
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    branch_every: PositiveInt = 1
    deep_every: PositiveInt = 1


class LanguagesConfig(Strict):
    """The languages that are evaluated (see ``bdm.evaluate.languages``)."""

    trained: tuple[Language, ...]
    never: tuple[Language, ...] = ()
    phrases: tuple[Language, ...] = ()


class EvaluateConfig(Strict):
    """The evaluation in the emoji world (see ``bdm.evaluate.report``).

    With ``plugins`` that of their combinations, with ``modes`` that of approximate modes, with ``languages``
    that of languages, with ``ablation`` that of several branches, with ``slider`` that of the world slider's
    values, with ``demo`` a picture for people that has so many of each kind. ``branch`` and
    ``native_text_encoder`` take the places of the model's own. ``choose`` goes on with the best of
    ``guidance_sweep`` and ``english_guidance_sweep``; ``pictures`` is how many of all concepts are drawn at
    most, 0 for all.
    """

    model: str
    branch: str | None = None
    native_text_encoder: str | None = None
    judge: str
    second_judge: str | None = None
    out: Path
    shuffled_branch: str | None = None
    world: WorldConfig = WorldConfig()
    sampler: str | None = None
    steps: PositiveInt = 12
    guidance: float = 4.0
    guidance_sweep: tuple[float, ...] = ()
    english_guidance: float | None = None
    english_guidance_sweep: tuple[float, ...] = ()
    choose: bool = False
    batch: PositiveInt = 32
    controls: PositiveInt = 64
    pictures: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    plugins: PluginFilesConfig | None = None
    modes: dict[str, ModeConfig] = Field({})
    languages: LanguagesConfig | None = None
    ablation: dict[str, AblationRowConfig] = Field({})
    slider: tuple[Fraction, ...] = ()
    demo: PositiveInt | None = None

    @model_validator(mode="after")
    def _guided(self) -> EvaluateConfig:
        if self.english_guidance is not None and not self.guidance > 1:
            raise ValueError(
                f"english_guidance {self.english_guidance:g} weighs a difference that is only computed with"
                f" guidance, and guidance is {self.guidance:g}: raise it above 1, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _tried(self) -> EvaluateConfig:
        if self.choose and not self.guidance_sweep:
            raise ValueError("choose takes the best of guidance_sweep, and that is empty; name values to try")
        tried = self.guidance_sweep if self.choose else (self.guidance,)
        if self.english_guidance_sweep and not min(tried) > 1:
            raise ValueError(
                "english_guidance_sweep weighs a difference that is only computed with guidance, and guidance"
                f" may be {min(tried):g}: try values above 1, or leave it out"
            )
        said = self.english_guidance is not None or bool(self.english_guidance_sweep)
        if any(row.composed for row in self.ablation.values()) and not said:
            raise ValueError(
                "a row of ablation is composed, and neither english_guidance nor english_guidance_sweep says"
                " how strongly; give one of them"
            )
        return self


class RouteConfig(Strict):
    """A route to a native language (see ``bdm.evaluate.route.Route``).

    ``translate`` is "world" (the names of the emoji world's things), "none" (native text through CLIP's
    bytes), a table or a translation model's folder. ``branch`` and ``native_text_encoder`` take the places of
    the model's own. ``shuffled`` is what was trained on shuffled captions, in the place of ``branch`` where
    that is given and else of ``model``; ``history`` the run whose kept states tell how fast it learned,
    ``pretraining`` the samples that its text encoder had seen before.
    """

    model: str
    branch: str | None = None
    native_text_encoder: str | None = None
    title: str = ""
    translate: str | None = None
    shuffled: str | None = None
    history: Path | None = None
    pretraining: Annotated[int, Field(ge=0)] = 0


class RoutesConfig(Strict):
    """The comparison of routes to a native language in the emoji world (see ``bdm.evaluate.routes``).

    ``base`` is the backbone that all began from, ``reference`` the route by whose accuracy the others'
    learning is timed.
    """

    kind: Literal["routes"]
    out: Path
    base: str
    routes: dict[str, RouteConfig]
    reference: str = "branch"
    language: Language = "ja"
    judge: str
    second_judge: str | None = None
    world: WorldConfig = WorldConfig()
    sampler: str | None = None
    steps: PositiveInt = 12
    guidances: tuple[Annotated[float, Field(gt=1)], ...] = (1.5, 2.0, 3.0, 4.0)
    batch: PositiveInt = 32
    controls: PositiveInt = 64
    seed: int = 0
    plugins: PluginFilesConfig | None = None

    @model_validator(mode="after")
    def _possible(self) -> RoutesConfig:
        if not self.routes or not self.guidances:
            raise ValueError("give at least one route and one of guidances")
        if self.language == "en":
            raise ValueError("language is en, which the backbone knows; give a native one")
        return self


class PromptsConfig(Strict):
    """The evaluation of any model on one's own texts (see ``bdm.evaluate.prompts``).

    ``prompts`` are texts or a prompt file, rows of BDM-870 among them (``long``: their long prompts).
    ``real`` is a folder of pictures for FID and KID. With ``english`` the bare backbone is told the texts.
    """

    kind: Literal["prompts"]
    out: Path
    model: str
    backbone: str | None = None
    branch: str | None = None
    native_text_encoder: str | None = None
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | str
    count: PositiveInt = 1000
    long: bool = False
    english: bool = False
    scorer: str | None = None
    features: str | None = None
    real: str | None = None
    sampler: str | None = None
    steps: PositiveInt = 20
    guidance: Annotated[float, Field(ge=1)] = 7.5
    width: PositiveInt | None = None
    height: PositiveInt | None = None
    batch: PositiveInt = 4
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> PromptsConfig:
        if (self.features is None) != (self.real is None):
            raise ValueError(
                "features and real belong together: Inception's weights, and what is compared with"
            )
        return self


#: The configuration of each kind of evaluation that says its kind; the others are of the emoji world.
_EVALUATIONS: dict[Any, type[RoutesConfig] | type[PromptsConfig] | type[FilterConfig]] = {
    "routes": RoutesConfig,
    "prompts": PromptsConfig,
    "filter": FilterConfig,
}


def read_evaluation(
    path: str | Path, overrides: Sequence[str]
) -> EvaluateConfig | RoutesConfig | PromptsConfig | FilterConfig:
    """The configuration of an evaluation, of whichever kind it says it is.

    Raises:
        UserError: see ``read_config``.
    """
    kind = read_tree(path, overrides).get("kind")
    if kind is not None and kind not in _EVALUATIONS:
        raise UserError(
            f"config {path}: kind is {kind!r}; allowed are {', '.join(_EVALUATIONS)}, and none for the emoji"
            " world"
        )
    return read_config(path, overrides, _EVALUATIONS.get(kind, EvaluateConfig))
