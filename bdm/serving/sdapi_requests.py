"""A1111's words -> requests."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..drawing.known_hashes import known_hash
from ..drawing.request import FileRef, Mode, PluginUse, Request
from ..drawing.samplers import named
from ..errors import UserError, quoted
from ..pipeline.enlarging import LATENT
from ..text.sides import split_sides
from .names import Names
from .sdapi_bodies import Drawing, ImageToImage, Options, TextToImage, without_effect
from .uploads import Uploads

_TITLE_HASH = re.compile(r"\s*\[[0-9a-fA-F]{8,64}\]\s*$")
_NONE = ("", "none", "automatic")
_CONTROL_KEYS = {
    "enabled", "image", "input_image", "module", "model", "weight", "guidance_start", "guidance_end",
}  # fmt: skip


class Reader:
    """Reads A1111's bodies.

    Args:
        names: finds files.
        uploads: keeps pictures that are sent.
        prompts: how a ``prompt`` without ``native_prompt`` is read: "split", by script (see
            ``bdm.text.sides``), "native" or "english".
    """

    def __init__(self, names: Names, uploads: Uploads, prompts: str = "split") -> None:
        self._names, self._uploads, self._prompts = names, uploads, prompts

    def text_to_image(self, body: TextToImage, options: Options) -> tuple[Request, int, list[str]]:
        """(the first picture's request, how many pictures, keys without effect).

        Raises:
            UserError: names what cannot be.
        """
        request, ignored = self._drawing(body, options)
        return replace(request, mode=self._hires(body)), count(body), ignored

    def image_to_image(self, body: ImageToImage, options: Options) -> tuple[Request, int, list[str]]:
        """The same of img2img."""
        request, ignored = self._drawing(body, options)
        return replace(request, mode=self._image(body)), count(body), ignored

    def sides(self, text: str) -> tuple[str, str]:
        """(native, English) of a prompt in one box."""
        if self._prompts == "split":
            return split_sides(text)
        return (text, "") if self._prompts == "native" else ("", text)

    def texts(
        self, prompt: str | None, negative: str | None, native: str | None, native_negative: str | None
    ) -> dict[str, str]:
        """The four texts: ``prompt`` and ``negative`` are English where a native one is given."""
        if native is None and native_negative is None:
            (native, english), (not_native, not_english) = map(self.sides, (prompt or "", negative or ""))
        else:
            english, not_english, not_native = prompt or "", negative or "", native_negative
        return dict(
            prompt=native or "", prompt_en=english, negative=not_native or "", negative_en=not_english
        )

    def _drawing(self, body: Drawing, options: Options) -> tuple[Request, list[str]]:
        settings = body.override_settings or Options.model_validate({})
        ignored = without_effect(body) + without_effect(settings, "override_settings.")
        said: dict[str, Any] = {
            "steps": body.steps,
            "guidance": body.cfg_scale,
            "width": body.width,
            "height": body.height,
            "branch_scale": body.branch_scale,
            "branch_start": body.branch_start,
            "branch_end": body.branch_end,
            "branch_schedule": body.branch_schedule,
            "world": body.world,
            "english_guidance": body.english_cfg_scale,
            "clip_skip": settings.CLIP_stop_at_last_layers or options.CLIP_stop_at_last_layers,
        }
        said = {name: value for name, value in said.items() if value is not None}
        said |= self.texts(body.prompt, body.negative_prompt, body.native_prompt, body.native_negative_prompt)
        said["seed"] = seed(body.seed)
        said["sampler"], said["schedule"] = _sampler(body, ignored)
        model, plugins = self._models(settings, options)
        plugins += self._controls(body.alwayson_scripts or {}, ignored)
        return Request(model=model, plugins=tuple(plugins), **said), ignored

    def _models(self, said: Options, usual: Options) -> tuple[FileRef | None, list[PluginUse]]:
        """The pipeline and the plug-ins that settings name."""
        checkpoint = _title(said.sd_model_checkpoint or usual.sd_model_checkpoint)
        vae = _title(said.sd_vae or usual.sd_vae)
        plugins = []
        model = None
        if checkpoint and checkpoint != self._names.model.name:
            model, used = checkpoint_of(self._names, checkpoint)
            plugins += used
        if vae:
            plugins.append(PluginUse(kind="vae", file=FileRef(self._names.listed(vae, "vae").name)))
        return model, plugins

    def _controls(self, scripts: Mapping[str, Any], ignored: list[str]) -> list[PluginUse]:
        found = []
        for name, script in list(scripts.items())[:50]:
            if name.lower() != "controlnet":
                ignored.append(f"alwayson_scripts.{name[:100]}")
                continue
            units = script.get("args", []) if isinstance(script, dict) else script
            if not isinstance(units, list):
                raise UserError(f"alwayson_scripts.{name[:20]}.args is {quoted(units)}; give a list")
            found += [self._control(unit, ignored) for unit in units if _is_on(unit)]
        return found

    def _control(self, unit: dict[str, Any], ignored: list[str]) -> PluginUse:
        ignored += [f"controlnet.{str(key)[:100]}" for key in unit if key not in _CONTROL_KEYS]
        picture = unit.get("image") or unit.get("input_image")
        picture = picture.get("image") if isinstance(picture, dict) else picture
        if not isinstance(picture, str):
            raise UserError("a ControlNet unit has no image; give one in base64")
        module = str(unit.get("module") or "none")
        model = self._names.listed(_title(str(unit.get("model") or "")), "controlnet")
        numbers: Any = {
            "strength": _number(unit, "weight", 1.0),
            "start": _number(unit, "guidance_start", 0.0),
            "end": _number(unit, "guidance_end", 1.0),
        }
        return PluginUse(
            kind="controlnet",
            file=FileRef(model.name, known_hash(model, "controlnet")),
            picture=self._uploads.keep(picture),
            annotator=None if module.lower() in _NONE else module,
            **numbers,
        )

    def _hires(self, body: TextToImage) -> Mode:
        if not body.enable_hr:
            return Mode()
        said: dict[str, Any] = {"strength": body.denoising_strength, "scale": body.hr_scale}
        said["second_steps"] = body.hr_second_pass_steps
        settings = {name: value for name, value in said.items() if value is not None}
        pictures = {}
        upscaler = (body.hr_upscaler or "Latent").strip()
        if upscaler.lower() in UPSCALERS:
            settings["upscaler"] = UPSCALERS[upscaler.lower()]
        else:
            found = self._names.listed(upscaler, "upscaler")
            pictures["upscaler"] = FileRef(found.name)
        return Mode("hires", tuple(sorted(pictures.items())), tuple(sorted(settings.items())))

    def _image(self, body: ImageToImage) -> Mode:
        if not body.init_images or len(body.init_images) != 1:
            raise UserError(f"init_images holds {len(body.init_images or [])} pictures; give one")
        pictures = {"image": self._uploads.keep(body.init_images[0])}
        settings: dict[str, Any] = {}
        if body.denoising_strength is not None:
            settings["strength"] = body.denoising_strength
        if body.mask:
            pictures["mask"] = self._uploads.keep(body.mask, invert=bool(body.inpainting_mask_invert))
            settings["blur"] = 4.0 if body.mask_blur is None else body.mask_blur
        name = "mask" if "mask" in pictures else "image"
        return Mode(name, tuple(sorted(pictures.items())), tuple(sorted(settings.items())))


#: A1111's names of upscalers that need no file, in small letters, and ours.
UPSCALERS = {
    "latent": "latent",
    "latent (nearest)": "latent nearest",
    "latent (nearest-exact)": "latent nearest",
    "latent (bicubic)": "latent bicubic",
    "lanczos": "lanczos",
    "nearest": "nearest",
} | {name: name for name in LATENT}


def checkpoint_of(names: Names, said: str) -> tuple[FileRef | None, list[PluginUse]]:
    """What a client calls a checkpoint: a pipeline's folder is the model, a file a plug-in."""
    found = names.listed(said, "checkpoint")
    if (Path(found) / "model_index.json").is_file():
        return FileRef(found.name, known_hash(found, "checkpoint")), []
    file = FileRef(found.name, known_hash(found, "checkpoint"))
    return None, [PluginUse(kind="checkpoint", file=file)]


def seed(said: int | None) -> int:
    """A seed: -1 and nothing stand for one that nobody chose, of the size that A1111 draws."""
    return secrets.randbelow(2**32) if said in (None, -1) else int(said or 0)


def count(body: Drawing) -> int:
    """How many pictures a body asks for."""
    for name in ("batch_size", "n_iter"):
        value = getattr(body, name)
        if value is not None and not 1 <= value <= 10_000:
            raise UserError(f"{name} is {quoted(value)}; give a whole number from 1 on")
    return (body.batch_size or 1) * (body.n_iter or 1)


def several(request: Request, number: int) -> list[Request]:
    """Requests for several pictures, the seeds one after the other."""
    return [replace(request, seed=(request.seed + i) % 2**63) for i in range(number)]


def _sampler(body: Drawing, ignored: list[str]) -> tuple[str, str]:
    """A1111's names of sampler and schedule; nothing for the model's own."""
    said = body.sampler_name or body.sampler_index or ""
    schedule = body.scheduler or ""
    if not said:
        if schedule.lower() not in _NONE:
            ignored.append("scheduler (without sampler_name)")
        return "", ""
    return named(said, schedule)


def _title(said: str | None) -> str:
    """A model's name without the hash that A1111 shows behind it; "" for none."""
    name = _TITLE_HASH.sub("", said or "").strip()
    return "" if name.lower() in _NONE else name


def _is_on(unit: Any) -> bool:
    if not isinstance(unit, dict):
        raise UserError(f"a ControlNet unit is {quoted(unit)}; give an object")
    return unit.get("enabled", True) not in (False, None) and _title(str(unit.get("model") or "")) != ""


def _number(unit: Mapping[str, Any], name: str, usual: float) -> float:
    value = unit.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1000 <= value <= 1000:
        raise UserError(f"ControlNet: {name} is {quoted(value)}; give a number")
    return float(value)
