"""One request: everything that decides a picture.

The command line, prompt files, pictures' own JSON and Python share this type. Files stand in it by their
hashes, so that a request holds on every machine that has them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted, whole_number
from ..shipped import find_path
from ..speed.approximate import EXACT, Approximation
from ..text.rules import A1111, PromptRules
from .typed_json import from_plain, has_half_characters, to_plain

#: Kinds of plug-ins.
KINDS = ("checkpoint", "vae", "adapter", "controlnet", "embedding", "ip_adapter")
#: Precisions of the networks.
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class FileRef:
    """A file or folder that a request needs.

    Attributes:
        name: its own, never a path; a hub's model has its owner's before it.
        hash: what it is known by: A1111's for models and plug-ins (see ``bdm.plugins.Plugin.hash``), of the
            pixels for pictures. "" before it was looked up.
        source: where it lies on this machine; no part of the JSON, and it makes no difference.
    """

    name: str
    hash: str = ""
    source: Path | None = field(default=None, compare=False, repr=False, metadata={"unsaid": True})

    @classmethod
    def to(cls, source: str | Path) -> FileRef:
        """A reference to a file or folder of this machine, or to a hub's model."""
        path = find_path(source)
        is_hubs = _is_hub_name(str(source)) and not os.path.exists(path)
        name = str(source) if is_hubs else path.name or Path(os.path.abspath(path)).name
        return cls(name.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), source=path)


def _is_hub_name(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "~", "/"))


@dataclass(frozen=True, kw_only=True)
class PluginUse:
    """A plug-in of a request.

    Attributes:
        kind: one of ``KINDS``.
        file: its file.
        name: how it is called; "" for the file's stem. An embedding's is its trigger word.
        strength: of an adapter's part in the UNet, a ControlNet's, or an IP-Adapter's.
        text_strength: of an adapter's part in the text encoder; None for ``strength``.
        start: share of the steps before which a ControlNet is off.
        end: share of the steps after which it is off.
        pooled: whether its residuals are averaged over the picture (shuffle ControlNets).
        picture: a ControlNet's condition, or what an IP-Adapter shows to the backbone.
        annotator: what turns the picture into a condition first.
        encoder: folder of an IP-Adapter's image encoder; None for the pipeline's own.
    """

    kind: str
    file: FileRef
    name: str = ""
    strength: float = 1.0
    text_strength: float | None = None
    start: float = 0.0
    end: float = 1.0
    pooled: bool | None = None
    picture: FileRef | None = None
    annotator: str | None = None
    encoder: FileRef | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"a plug-in of kind {quoted(self.kind)}; allowed are {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class BranchUse:
    """A branch beside the model's own, and what it is told.

    Attributes:
        file: a pipeline's folder that holds the branch and its native text encoder.
        prompt: its native prompt; what schedules words, joins prompts or names adapters is refused.
        negative: its native negative prompt.
        scale: strength of its residuals.
        start: share of the steps before which it is off.
        end: share of the steps after which it is off.
        schedule: factors of the strength over the steps; "" for one.
    """

    file: FileRef
    prompt: str = ""
    negative: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    schedule: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "schedule"):
            _check_text(name, getattr(self, name))
        for name in ("scale", "start", "end"):
            _check_number(name, getattr(self, name))


@dataclass(frozen=True)
class Mode:
    """What a picture is drawn from.

    Attributes:
        name: a key of ``bdm.drawing.modes.MODES``; "text" starts from noise alone.
        pictures: what it starts from, by role ("image", "mask").
        settings: numbers and texts of this mode, by name.
    """

    name: str = "text"
    pictures: tuple[tuple[str, FileRef], ...] = ()
    settings: tuple[tuple[str, float | int | str | bool], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As an object of objects."""
        pictures = {role: to_plain(file) for role, file in self.pictures}
        return {"name": self.name, "pictures": pictures, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, said: Any, where: str = "the mode") -> Mode:
        """Of what ``to_json`` gave.

        Raises:
            UserError: names what is unknown, or of another kind.
        """
        if not isinstance(said, Mapping) or not isinstance(said.get("name"), str):
            raise UserError(f'{where} is {quoted(said)}; give an object such as {{"name": "text"}}')
        for key, value in said.items():
            if key not in ("name", "pictures", "settings"):
                raise UserError(f"{where} says {quoted(key)}; allowed are name, pictures, settings")
            if key != "name" and not isinstance(value, Mapping):
                raise UserError(f"{where}, {key}, is {quoted(value)}; give an object")
        pictures = said.get("pictures", {})
        settings = said.get("settings", {})
        for name, value in settings.items():
            if not isinstance(value, str | int | float):
                raise UserError(f"{where}, {name}, is {quoted(value)}; give a number or a text")
        files = [(role, from_plain(FileRef, file, f"{where}, {role},")) for role, file in pictures.items()]
        return cls(said["name"], tuple(sorted(files)), tuple(sorted(settings.items())))


@dataclass(frozen=True)
class Versions:
    """What drew a picture; "" before it is drawn. On others the last bits may differ.

    Attributes:
        bdm: version of this package.
        torch: likewise.
        diffusers: likewise.
        transformers: likewise.
        device: "cpu", or a GPU's name.
        together: pictures that were computed at once; the last bits of one in a batch hang on its size.
    """

    bdm: str = ""
    torch: str = ""
    diffusers: str = ""
    transformers: str = ""
    device: str = ""
    together: int = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """A picture that is asked for.

    Attributes:
        prompt: native prompt, read by the branch.
        negative: native negative prompt.
        prompt_en: English prompt of the backbone.
        negative_en: English negative prompt.
        seed: of the noise, from 0 to 2^63 - 1.
        width: in pixels; None for the model's own.
        height: likewise.
        enlarge: whole factor by which the drawn picture is enlarged before it is saved.
        mode: what it is drawn from.
        model: the pipeline; None for the shipped one.
        branch: folder of another branch than the model's own, or of a pipeline, whose branch and native text
            encoder are taken.
        plugins: on its backbone.
        sampler: A1111's name; "" for the model's own.
        schedule: A1111's name; "" for the sampler's own.
        steps: of denoising.
        guidance: scale; None for the model's usual one.
        english_guidance: of the English prompt apart; None for one scale for both.
        clip_skip: layer of the English text encoder, from the end; 1 is the last.
        rules: how prompts are read: emphasis and chunks among it.
        branch_scale: strength of the branch.
        branch_start: share of the steps before which it is off.
        branch_end: share of the steps after which it is off.
        branch_schedule: factors of the strength over the steps, such as "0:0.2:0,0.2:1:1"; "" for one.
        world: from 0, the native one, to 1, the English one, in place of a schedule; None for neither.
        beside: further branches, each with a prompt of its own.
        approximation: work that is left out.
        precision: of the networks, one of ``PRECISIONS``; None for the device's usual one.
        versions: what drew it; makes no difference to what is asked for.
    """

    prompt: str = ""
    negative: str = ""
    prompt_en: str = ""
    negative_en: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None
    enlarge: int = 1
    mode: Mode = Mode()
    model: FileRef | None = None
    branch: FileRef | None = None
    plugins: tuple[PluginUse, ...] = ()
    sampler: str = ""
    schedule: str = ""
    steps: int = 30
    guidance: float | None = None
    english_guidance: float | None = None
    clip_skip: int = 1
    rules: PromptRules = A1111
    branch_scale: float = 1.0
    branch_start: float = 0.0
    branch_end: float = 1.0
    branch_schedule: str = ""
    world: float | None = None
    beside: tuple[BranchUse, ...] = ()
    approximation: Approximation = EXACT
    precision: str | None = None
    versions: Versions = Versions()

    def __post_init__(self) -> None:
        for name in ("plugins", "beside"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if sum(plugin.kind == "ip_adapter" for plugin in self.plugins) > 1:
            raise UserError("two IP-Adapters are asked for; give one")
        for name in ("prompt", "negative", "prompt_en", "negative_en"):
            _check_text(name, getattr(self, name))
        if (seed := whole_number(self.seed)) is None or not 0 <= seed < 2**63:
            raise UserError(f"seed {quoted(self.seed)}: give a whole number from 0 to {2**63 - 1}")
        object.__setattr__(self, "seed", seed)
        for name in ("steps", "enlarge", "clip_skip"):
            if (whole_number(getattr(self, name)) or 0) < 1:
                raise UserError(f"{name} {quoted(getattr(self, name))}: give a whole number from 1 on")
        for name in ("guidance", "english_guidance", "branch_scale", "branch_start", "branch_end", "world"):
            _check_number(name, getattr(self, name))
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UserError(f"precision {quoted(self.precision)}; allowed are {', '.join(PRECISIONS)}")

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON's values; ``from_json`` gives an equal request."""
        return {item.name: to_plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, said: Any, where: str = "the request") -> Request:
        """Of an object, or its text; keys that it does not have are at their defaults.

        Raises:
            UserError: names an unknown key, or a value of another kind.
        """
        if isinstance(said, str | bytes):
            try:
                said = json.loads(said)
            except (ValueError, RecursionError):
                raise UserError(f"{where} is not JSON; give an object") from None
        return from_plain(cls, said, where)

    def essence(self) -> dict[str, Any]:
        """What decides the picture: its JSON without versions and without names of files, which hashes tell.

        An embedding's name stays: it is the word that the prompt calls it by.
        """
        said = self.to_json()
        del said["versions"]
        files = [said["model"], said["branch"], *said["mode"]["pictures"].values()]
        files += [use["file"] for use in said["beside"]]
        for plugin in said["plugins"]:
            files += [plugin["file"], plugin["picture"], plugin["encoder"]]
            if plugin["kind"] != "embedding":
                del plugin["name"]
        for file in filter(None, files):
            del file["name"]
        return said

    def files(self) -> list[FileRef]:
        """All files that it needs."""
        files = [self.model, self.branch, *(plugin.file for plugin in self.plugins)]
        files += [file for plugin in self.plugins for file in (plugin.picture, plugin.encoder)]
        files += [*(file for _, file in self.mode.pictures), *(use.file for use in self.beside)]
        return [file for file in files if file is not None]


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name} is {quoted(text)}; give a text")
    if has_half_characters(text):
        raise UserError(f"{name}: the text {quoted(text)} holds half a character; write it anew")


def _check_number(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise UserError(f"{name} {quoted(value)}: give a finite number")
