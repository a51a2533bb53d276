"""A pipeline's parts: from a folder, from a checkpoint file, handed in by the caller."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..errors import UserError
from ..formats.checkpoint import load_controlnet
from ..formats.load_options import LoadKeywords, LoadOptions, read_options
from ..formats.systems import ReleasedSystem, refuse_other_systems, released_system
from ..formats.weights import read_json, read_tensors, resolve_folder
from ..method.branch import BranchModel
from ..models.backbone import Backbone, build_backbone, empty_prompt_features, find_backbone
from ..models.fingerprint import refuse_other_vae
from ..text.encoders import read_encoder_config
from ..text.native import NativeTextEncoder

#: What "" means to an English text encoder that is not in the folder.
EMPTY_FILE = "empty_english.safetensors"

#: Parts that make up a ``Backbone``.
_STOCK = tuple(field.name for field in dataclasses.fields(Backbone))

#: Parts that a caller may also name by a path or a hub name.
_BY_PATH = ("branch", "native_text_encoder", "vae", "controlnet")


class PipelineKeywords(LoadKeywords, total=False):
    """What a pipeline's ``from_pretrained`` takes besides: parts of its own or another place.

    A part that is there already is used as it is; one that is None is left out.

    Attributes:
        branch: a branch, its folder or its hub name.
        native_text_encoder: likewise, or a file of cn_clip.
        vae: a VAE, its file, its folder or its hub name.
        controlnet: likewise, or a list of them; for the pipelines that have one.
    """

    branch: BranchModel | str | Path | None
    native_text_encoder: NativeTextEncoder | str | Path | None
    vae: AutoencoderKL | str | Path | None
    controlnet: ControlNetModel | list[Any] | str | Path | None
    unet: UNet2DConditionModel | None
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer | None
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    image_encoder: Any
    requires_safety_checker: bool


@dataclass(frozen=True)
class LoadedParts:
    """What a pipeline is made of.

    Attributes:
        arguments: of its constructor, by name.
        empty_english: (1, 77, D) features of the English prompt "" where the text encoder is left out.
        moved_unet: why the UNet is not SD1.5's any more; "" where nothing says so.
    """

    arguments: dict[str, Any]
    empty_english: Tensor | None
    moved_unet: str = ""


def load_parts(
    reader: str,
    names: Collection[str],
    source: str | Path | None,
    backbone: str | Path | None,
    english: bool,
    options: Mapping[str, Any],
) -> LoadedParts:
    """The parts of a pipeline.

    Args:
        reader: for messages, such as "BridgePipeline.from_pretrained".
        names: arguments of the pipeline's constructor.
        source: the pipeline's folder or hub name; None if all parts but the backbone are given.
        backbone: another model than the source's.
        english: whether the English text encoder is loaded.
        options: see ``PipelineKeywords``.

    Raises:
        UserError: missing, damaged or unfitting files, or an option that is not known or not done here.
    """
    given = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    loading = read_options(rest, reader, torch.float32, parts=tuple(names))
    if not english:
        given = {"text_encoder": None, "tokenizer": None} | given
    for name, value in given.items():
        if isinstance(value, str | Path) and name not in _BY_PATH:
            raise UserError(
                f"{reader}: {name} is {str(value)!r}; give one that is loaded, or backbone= for another model"
            )
    model = SavedModel.find(source, backbone, loading)
    given = model.without_its_own(given)
    parts = PartLoader(reader, model, given)
    stock = build_backbone(model.backbone, _stock_given(model, given), model.loading)
    _refuse_other_latents(model, given, stock.vae)
    arguments = {name: read(parts) for name, read in _READERS.items() if name in names}
    arguments |= {name: getattr(stock, name) for name in _STOCK}
    empty = None if stock.text_encoder is not None else _empty_english(model)
    own_unet = model.backbone == model.folder and "unet" not in given
    return LoadedParts(arguments, empty, model.moved_unet() if own_unet else "")


def _refuse_other_latents(model: SavedModel, given: Mapping[str, Any], vae: Any) -> None:
    """Refuse a branch that learned other latents than those of the VAE, unless that was given on purpose."""
    place = given.get("branch", model.folder and model.folder / "branch")
    if "vae" not in given and vae is not None and isinstance(place, str | Path):
        refuse_other_vae(place, vae, model.backbone)


@dataclass(frozen=True)
class SavedModel:
    """Where a pipeline's parts lie, and how they are loaded.

    Attributes:
        folder: the pipeline's; None where there is only a backbone.
        index: what its ``model_index.json`` says.
        backbone: file or folder of the backbone; the same folder where no other was asked for.
        loading: how parts are loaded; a part without the variant is loaded without it.
        system: the released system that lies there, if it is one.
    """

    folder: Path | None
    index: Mapping[str, Any]
    backbone: Path
    loading: LoadOptions
    system: ReleasedSystem | None = None

    @staticmethod
    def find(source: str | Path | None, backbone: str | Path | None, loading: LoadOptions) -> SavedModel:
        """Find a pipeline's folder and its backbone.

        Raises:
            UserError: not there, or without the variant that is asked for.
        """
        folder = None if source is None else resolve_folder(source, hub=loading.hub)
        index = folder / "model_index.json" if folder else None
        own = folder if backbone is None else find_backbone(backbone, loading.elsewhere())
        assert own is not None, "a source or a backbone"
        places = [place for place in (folder, own) if place and place.is_dir()]
        if places:
            folders = [path for place in places for path in place.iterdir() if path.is_dir()]
            loading = dataclasses.replace(loading, files=loading.files.among(folders, source or backbone))
        if own.is_file():
            loading.files.check_file(own)
        known = read_json(index) if index and index.is_file() else {}
        for place in places:
            refuse_other_systems(place)
        return SavedModel(folder, known, own, loading, released_system(folder) if folder else None)

    def without_its_own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a caller gives, and None for what a released system has not: a branch, and English CLIP."""
        if self.system is None:
            return dict(given)
        english = () if self.backbone != self.folder else ("text_encoder", "tokenizer")
        return dict.fromkeys(("branch", *english)) | dict(given)

    def moved_unet(self) -> str:
        """Why the folder's UNet is not SD1.5's any more; "" where nothing says so."""
        if self.system is not None:
            return f"{self.system.name}: {self.system.trained}"
        card = self.folder / "card.json" if self.folder else None
        changed = read_json(card).get("unet_tensors_changed") if card and card.is_file() else None
        if isinstance(changed, int | float) and changed > 0:
            return f"its card: {changed:.0%} of the tensors were changed"
        return str(self.index.get("_moved_unet") or "")

    def lacks(self, name: str) -> bool:
        """Whether the pipeline was saved without a part.

        What another pipeline left in the folder is none of it. Only older folders name no native text encoder
        although they hold one.
        """
        older = name == "native_text_encoder" and self.folder is not None and (self.folder / name).is_dir()
        return self.index.get(name) == [None, None] and not older


def _stock_given(model: SavedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's parts that are given, and None for those that it was saved without."""
    own = model.backbone == model.folder
    without = [name for name in _STOCK if own and model.lacks(name)]
    return dict.fromkeys(without) | {name: given[name] for name in _STOCK if name in given}


class PartLoader:
    """Loads the parts beside the backbone, unless they are given.

    Args:
        reader: for messages.
        model: where they lie.
        given: parts that are there already, or their paths.
    """

    def __init__(self, reader: str, model: SavedModel, given: Mapping[str, Any]) -> None:
        self.reader = reader
        self.model = model
        self.given = given

    def place(self, name: str, optional: bool = False) -> Any:
        """A part that is there already, or where it lies; None for one that is left out.

        Raises:
            UserError: it is neither given nor in the folder.
        """
        if name in self.given:
            return self.given[name]
        folder = self.model.folder
        if self.model.lacks(name):
            return None
        if folder is not None and (folder / name).is_dir():
            return folder / name
        if optional and name not in self.model.index:
            return None
        raise UserError(f"{self.reader}: {folder or 'a backbone'} holds no {name}; give {name}=")

    def native_text_encoder(self) -> Any:
        """The native text encoder; in a released system's folder it lies where CLIP lies in others."""
        loading, system = self.model.loading, self.model.system
        if system is None or "native_text_encoder" in self.given:
            return self.model_of("native_text_encoder", NativeTextEncoder)
        return NativeTextEncoder.from_pretrained(
            self.model.folder or "", dtype=loading.dtype_of("native_text_encoder") or "auto",
            device_map=loading.device, use_safetensors=loading.files.use_safetensors,
        )  # fmt: skip

    def read(self, name: str, load: Callable[..., Any], optional: bool = False) -> Any:
        """A part, loaded by ``load(place, **keywords)``."""
        place = self.place(name, optional)
        if not isinstance(place, str | Path):
            return place
        loading = self.model.loading
        plain = dataclasses.replace(loading.files, or_plain=False)
        has_variant = plain.variant and plain.find(Path(place))[0]
        return load(
            place, dtype=loading.dtype_of(name) or "auto", variant=plain.variant if has_variant else None,
            use_safetensors=plain.use_safetensors,
        )  # fmt: skip

    def model_of(self, name: str, kind: Any) -> Any:
        """A branch or a native text encoder."""
        loading = self.model.loading
        return self.read(
            name, partial(kind.from_pretrained, device_map=loading.device, **loading.elsewhere())
        )

    def transformer_of(self, name: str, kind: Any) -> Any:
        """A model of transformers that a pipeline can do without."""

        def load(place: str | Path, **keywords: Any) -> Any:
            folder = resolve_folder(place, hub=self.model.loading.elsewhere())
            # transformers would fetch kernels that a configuration names.
            return kind.from_pretrained(folder, config=read_encoder_config(folder), **keywords)

        part = self.read(name, load, optional=True)
        if part is None or name in self.given:
            return part
        return part.eval().requires_grad_(False).to(self.model.loading.device)

    def feature_extractor(self) -> Any:
        """What prepares pictures for the image encoder and the safety checker."""
        place = self.place("feature_extractor", optional=True)
        return CLIPImageProcessor.from_pretrained(place) if isinstance(place, Path) else place

    def controlnet(self) -> Any:
        """A ControlNet, or several as diffusers saves them: ``controlnet``, ``controlnet_1`` ..."""
        place = self.place("controlnet")
        if isinstance(place, list | tuple):
            return [self._controlnet(one) for one in place]
        if "controlnet" in self.given or place is None:
            return self._controlnet(place)
        numbered = (place.with_name(f"controlnet_{i}") for i in itertools.count(1))
        read = [self._controlnet(one) for one in (place, *itertools.takewhile(Path.is_dir, numbered))]
        return read if len(read) > 1 else read[0]

    def _controlnet(self, place: Any) -> Any:
        if not isinstance(place, str | Path):
            return place
        loading = self.model.loading
        path = find_backbone(place, loading.elsewhere())
        return load_controlnet(path, loading.dtype_of("controlnet"), loading.files).to(loading.device)

    def requires_safety_checker(self) -> bool:
        """What is given, else what the folder says; without a checker it says nothing."""
        there = self.place("safety_checker", optional=True) is not None
        noted = there and self.model.index.get("requires_safety_checker", True)
        return bool(self.given.get("requires_safety_checker", noted))


#: Constructor arguments beside the backbone's, and how they are read.
_READERS: dict[str, Callable[[PartLoader], Any]] = {
    "branch": lambda parts: parts.model_of("branch", BranchModel),
    "native_text_encoder": PartLoader.native_text_encoder,
    "controlnet": PartLoader.controlnet,
    "safety_checker": lambda parts: parts.transformer_of("safety_checker", StableDiffusionSafetyChecker),
    "image_encoder": lambda parts: parts.transformer_of("image_encoder", CLIPVisionModelWithProjection),
    "feature_extractor": PartLoader.feature_extractor,
    "requires_safety_checker": PartLoader.requires_safety_checker,
}


def _empty_english(model: SavedModel) -> Tensor | None:
    """What "" means to a text encoder that is left out; None where nothing tells."""
    path, loading = model.backbone, model.loading
    dtype = loading.dtype_of("text_encoder")
    kept = path / EMPTY_FILE
    if path == model.folder and model.system is not None:
        return None
    if path == model.folder and model.lacks("text_encoder"):
        return read_tensors(kept)["features"].to(dtype) if kept.is_file() else None
    return empty_prompt_features(path, dtype, loading.files)


def keep_empty_english(features: Tensor | None, folder: Path) -> None:
    """Keep what "" means beside a pipeline that is saved without its text encoder, or nothing of another."""
    if features is None:
        (folder / EMPTY_FILE).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"features": features.contiguous()}, folder / EMPTY_FILE)
