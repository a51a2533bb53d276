"""A1111's ``parameters`` text -> a request, with all that the text says and is not drawn here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import UserError
from ..models.sampler_names import SAMPLERS
from ..pipeline.enlarging import LATENT, PICTURE
from ..speed.approximate import Approximation
from ..text.reader import read_prompt
from ..text.rules import PromptRules
from ..text.sides import is_native, split_sides
from .a1111_text import Parameters, read_pairs, read_parameters
from .a1111_values import (
    NUMBERS,
    OUR_NUMBERS,
    one_of,
    read_finite,
    read_flag,
    read_interval,
    read_object,
    read_size,
)
from .library import Library
from .request import FileRef, Mode, PluginUse, Request
from .samplers import named

Value = TypeVar("Value")

#: How texts of ours say which program wrote them.
_OURS = "bdm "
#: Settings that change no picture.
_SILENT = (
    "Version", "User", "Time taken", "Batch size", "Batch pos", "Civitai resources", "Civitai metadata",
    "Created Date", "Source Identifier",
)  # fmt: skip
#: What A1111 draws by where no schedule is said.
_PLAIN = "Uniform"
_NONE = ("none", "automatic")
#: A1111's names of how latents are enlarged, and ours.
_LATENT = {
    "latent": "latent",
    "latent (bicubic)": "latent bicubic",
    "latent (nearest-exact)": "latent nearest",
}
_CALL = re.compile(r"<(\w+):[^<>]*>")
_LAST_CALLS = re.compile(r"(?:\s?<lora:[^<>]*>)+\Z")
_ROOM = ("Left", "Top", "Right", "Bottom", "Overlap")
#: Fields of a request, and how our texts say them.
_ENGLISH = {"prompt_en": "English prompt", "negative_en": "English negative prompt"}
_RULES = ("Emphasis", "Chunks", "Punctuation")
_EVERY = {"branch_every": "Branch every", "deep_every": "Deep every"}


@dataclass(frozen=True)
class Read:
    """What a text was read as.

    Attributes:
        request: with all that is recognised; its files are those of this machine.
        unknown: what the text says besides, and is not drawn here.
        missing: files that are not here.
        lacks: options of what it was drawn from ("image", "mask", "outpaint"), which no text holds.
        notes: what else may make another picture of it.
    """

    request: Request
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_a1111(text: str, library: Library) -> Read:
    """Read A1111's text, or ours, as a request.

    Where bdm wrote the text, its prompt is the native one. Any other's is divided by script (see
    ``bdm.text.sides``): a prompt in Latin letters is the backbone's, and the branch is off where nothing is
    said in another script, as there was none.

    Args:
        text: of a picture.
        library: where its files are looked for, by hash or else by name.

    Raises:
        UserError: it has no line of settings.
    """
    return _Reading(read_parameters(text), library).read()


@dataclass
class _Reading:
    """What is left to read of a text, and what was not found."""

    said: Parameters
    library: Library
    why: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = dict(self.said.settings)
        self.ours = self.left.get("Version", "").startswith(_OURS)
        self.hashes = self.take("Hashes", read_object) or {}
        known = ("model", "vae", "lora:", "embed:")
        self.unknown += [f"Hashes: {name}" for name in self.hashes if not name.startswith(known)]

    def read(self) -> Read:
        fields = self._texts() | self._numbers() | self._sampler() | self._rules()
        plugins = [*self._plugins()]
        fields |= self._model(plugins) | self._branch()
        enlarge = self.take("Enlarged", int) if self.ours else None
        mode = self._mode()
        fields |= {"mode": mode, "enlarge": enlarge or 1} | self._size(mode, enlarge or 1)
        fields["approximation"] = self._approximation()
        request = Request(plugins=tuple(plugins), **{k: v for k, v in fields.items() if v is not None})
        self._random()
        for name in _SILENT:
            self.left.pop(name, None)
        unknown = [self._as_said(name) for name in self.left]
        unknown = (*self.unknown, *unknown, *self.said.rest)
        return Read(request, unknown, tuple(self.missing), tuple(self.lacks), tuple(self.notes))

    def take(self, name: str, read: Callable[[str], Value]) -> Value | None:
        """A setting's value; None for one that is not said, or cannot be read, which is left then."""
        if name not in self.left:
            return None
        try:
            value = read(self.left[name])
        except UserError as error:
            self.why[name] = f" ({error})"
            return None
        except (ValueError, RecursionError):
            return None
        del self.left[name]
        return value

    def _as_said(self, name: str) -> str:
        return f"{name}: {self.left[name]}{self.why.get(name, '')}"

    def _texts(self) -> dict[str, Any]:
        prompt, negative = self.said.prompt, self.said.negative
        self.unknown += [call[0] for text in (prompt, negative) for call in _not_read(text)]
        self.called = {lora.name: lora for text in (prompt, negative) for lora in read_prompt(text).loras}
        if self.ours:
            english = {name: self.take(said, str) for name, said in _ENGLISH.items()}
            return {"prompt": _LAST_CALLS.sub("", prompt), "negative": negative} | english
        (native, prompt_en), (not_native, negative_en) = map(_divided, (prompt, negative))
        texts = {"prompt": native, "prompt_en": prompt_en, "negative": not_native, "negative_en": negative_en}
        return texts if native else texts | {"branch_scale": 0.0}

    def _numbers(self) -> dict[str, Any]:
        kinds = NUMBERS | (OUR_NUMBERS if self.ours else {})
        found = {name: self.take(said, read) for said, (name, read) in kinds.items()}
        window = self.take("Branch window", read_interval) if self.ours else None
        if window is not None:
            found |= {"branch_start": window[0], "branch_end": window[1]}
        return {name: value for name, value in found.items() if value is not None}

    def _sampler(self) -> dict[str, Any]:
        said = self.left.get("Schedule type", "")
        found = self.take("Sampler", lambda sampler: named(sampler, said))
        if found is None:
            return {}
        self.left.pop("Schedule type", None)
        sampler, schedule = found
        if not self.ours and not schedule and SAMPLERS[sampler].scheduled:
            schedule = _PLAIN
        return {"sampler": sampler, "schedule": schedule}

    def _rules(self) -> dict[str, Any]:
        if not self.ours:
            self.take("Emphasis", lambda said: one_of(said, ("Original",)))
            return {}
        said: dict[str, Any] = {name.lower(): self.take(name, str) for name in _RULES}
        said |= {name.lower(): self.take(name, read_flag) for name in ("Routing", "Simplified")}
        return {"rules": PromptRules(**{name: value for name, value in said.items() if value is not None})}

    def _approximation(self) -> Approximation:
        said: dict[str, Any] = {}
        if self.ours:
            start, end = self.take("Guidance interval", read_interval) or (0.0, 1.0)
            said = {"guidance_start": start, "guidance_end": end}
            said |= {name: self.take(title, int) or 1 for name, title in _EVERY.items()}
        return Approximation(**said)

    def _plugins(self) -> Iterator[PluginUse]:
        """VAE, adapters and embeddings that are here."""
        vae, digits = self.left.pop("VAE", ""), self.left.pop("VAE hash", self.hashes.get("vae", ""))
        if (vae or digits) and vae.lower() not in _NONE:
            yield from self._found("vae", vae, digits)
        yield from self._called("adapter", "Lora hashes", "lora:", self.called)
        yield from self._called("embedding", "TI hashes", "embed:", {})

    def _called(self, kind: str, title: str, prefix: str, called: Mapping[str, Any]) -> Iterator[PluginUse]:
        """What prompts call by names, which the text gives hashes of."""
        short = {
            name.removeprefix(prefix): said for name, said in self.hashes.items() if name.startswith(prefix)
        }
        hashes = short | (self.take(title, read_pairs) or {})
        for name in dict.fromkeys([*hashes, *called]):
            if kind == "adapter" and name not in called:
                self.unknown.append(f"{title}: {name}")
            else:
                yield from self._found(kind, name, hashes.get(name, ""), **self._strengths(kind, name))

    def _strengths(self, kind: str, name: str) -> dict[str, Any]:
        if kind != "adapter":
            return {"name": name}
        called = self.called[name]
        return {"name": name, "strength": called.unet_strength, "text_strength": called.text_strength}

    def _found(self, kind: str, said: str, digits: str, **settings: Any) -> Iterator[PluginUse]:
        file = self._file(kind, said, digits)
        if file is not None:
            yield PluginUse(kind=kind, file=file, **settings)

    def _file(self, kind: str, name: str, digits: str) -> FileRef | None:
        """A file that is here; one that is not is noted."""
        place = self.library.by_digits(name, digits, kind) if digits else self.library.listed(name, kind)
        if place is None:
            self.missing.append(f"{kind} {name} (hash {digits or 'unknown'})")
            return None
        return self.library.located(FileRef.to(place), kind)

    def _model(self, plugins: list[PluginUse]) -> dict[str, Any]:
        """The pipeline, or a checkpoint on the usual one."""
        name = self.left.pop("Model", "")
        digits = self.left.pop("Model hash", self.hashes.get("model", ""))
        file = self._file("checkpoint", name, digits) if name or digits else None
        pipeline = self._named("Pipeline", "checkpoint")
        if file is None:
            return {} if pipeline is None else {"model": pipeline}
        if file.source is not None and (file.source / "model_index.json").is_file():
            return {"model": file}
        plugins.insert(0, PluginUse(kind="checkpoint", file=file))
        return {} if pipeline is None else {"model": pipeline}

    def _branch(self) -> dict[str, Any]:
        return {"branch": self._named("Branch", "branch")}

    def _named(self, title: str, kind: str) -> FileRef | None:
        """A folder that only our texts name."""
        if not self.ours or f"{title} hash" not in self.left:
            return None
        return self._file(kind, self.left.pop(title, ""), self.left.pop(f"{title} hash"))

    def _mode(self) -> Mode:
        """What it was drawn from; the pictures themselves are in no text."""
        if self.left.keys() & {"Hires upscale", "Hires resize"}:
            return self._hires()
        strength = self.take("Denoising strength", read_finite)
        if strength is None:
            return Mode()
        settings: dict[str, Any] = {"strength": strength}
        if self.ours and any(side in self.left for side in _ROOM):
            settings |= {side.lower(): self.take(side, int) or 0 for side in _ROOM}
            self.lacks += ["image", "outpaint"]
            return Mode("outpaint", settings=tuple(sorted(settings.items())))
        blur = self.take("Mask blur", read_finite)
        self.take("Inpaint area", lambda said: one_of(said, ("Whole picture",)))
        self.take("Masked content", lambda said: one_of(said, ("original",)))
        self.lacks += ["image"] if blur is None else ["image", "mask"]
        settings |= {} if blur is None else {"blur": blur}
        return Mode("image" if blur is None else "mask", settings=tuple(sorted(settings.items())))

    def _hires(self) -> Mode:
        settings: dict[str, Any] = {
            "scale": self.take("Hires upscale", read_finite) or self.take("Hires resize", self._resized),
            "strength": self.take("Denoising strength", read_finite),
            "second_steps": self.take("Hires steps", int),
        }
        files: tuple[tuple[str, FileRef], ...] = ()
        said = self.left.pop("Hires upscaler", "latent")
        upscaler = said.lower() if self.ours else _LATENT.get(said.lower(), said.lower())
        if upscaler in (*LATENT, *PICTURE):
            settings["upscaler"] = upscaler
        else:
            file = self._file("upscaler", said, "")
            files = () if file is None else (("upscaler", file),)
        settings = {name: value for name, value in settings.items() if value is not None}
        return Mode("hires", files, tuple(sorted(settings.items())))

    def _resized(self, said: str) -> float:
        """The factor of a size, which must be the same for both sides."""
        (width, height), (own_width, own_height) = read_size(said), read_size(self.left.get("Size", ""))
        if width * own_height != height * own_width:
            raise ValueError(said)
        return width / own_width

    def _size(self, mode: Mode, enlarge: int) -> dict[str, Any]:
        """The size that is asked for: the first pass's, which in ours the picture's own came from."""
        scale = dict(mode.settings).get("scale", 1.0) if self.ours and mode.name == "hires" else 1.0

        def read(said: str) -> tuple[int, int]:
            sides = [side / enlarge / float(scale) for side in read_size(said)]
            if any(side != round(side) for side in sides):
                raise ValueError(said)
            return round(sides[0]), round(sides[1])

        found = self.take("Size", read)
        if found is None or mode.name == "outpaint":
            return {}
        return {"width": found[0], "height": found[1]}

    def _random(self) -> None:
        if not self.ours and self.take("RNG", lambda said: one_of(said, ("CPU",))) is None:
            self.notes.append(
                "A1111 draws its noise on the GPU unless it says RNG: CPU, and ours is the CPU's"
            )


def _divided(text: str) -> tuple[str, str]:
    """(native, English) of a prompt; one in Latin letters stays as it is."""
    return split_sides(text) if is_native(text) else ("", text)


def _not_read(text: str) -> Iterator[re.Match[str]]:
    """Calls of what is no adapter, or of one with more than two strengths."""
    for call in _CALL.finditer(text):
        if not read_prompt(call[0]).loras:
            yield call
