"""How a picture was made, written into the picture: A1111's ``parameters`` text and the request's JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..errors import printable
from ..text.rules import A1111
from .request import PluginUse, Request

USER_COMMENT, MAKER_NOTE, EXIF_IFD = 0x9286, 0x927C, 0x8769
#: How the JSON begins in a JPEG's application segments (APP9), and in a WebP's maker note. A JPEG's comment
#: segment is read as another program's by sd-prompt-reader.
JSON_SEGMENT = b"bdm\0"
#: Bytes that a JPEG's segment holds beside its length.
_SEGMENT = 65_533
#: Units of UTF-16 of a comment in one: without the header of EXIF, two directories and the comment's mark.
_JPEG_UNITS = (_SEGMENT - 6 - 44 - 8) // 2


def parameters_text(request: Request, size: tuple[int, int], sampler: str = "", schedule: str = "") -> str:
    """A1111's grammar: prompt, negative prompt, one line of settings.

    LoRA stand behind the prompt, as A1111 calls them (``<lora:ink:0.8>``). The English prompts are settings
    of their own.

    Args:
        request: what drew the picture, complete.
        size: the picture's own, in pixels.
        sampler: by A1111's name, where the request leaves it to the model.
        schedule: likewise.
    """
    lines = [" ".join(filter(None, (request.prompt, *_calls(request.plugins, request.prompt))))]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    settings = _settings(request, size, request.sampler or sampler, request.schedule or schedule)
    lines.append(", ".join(f"{name}: {value}" for name, value in settings if value not in ("", None)))
    return "\n".join(lines)


def _settings(
    request: Request, size: tuple[int, int], sampler: str, schedule: str
) -> Iterable[tuple[str, Any]]:
    """The settings, those that naive readers look for first."""
    checkpoint = next((p.file for p in request.plugins if p.kind == "checkpoint"), request.model)
    yield from (("Steps", request.steps), ("Sampler", sampler), ("Schedule type", schedule))
    yield from (("CFG scale", _number(request.guidance)), ("Seed", request.seed))
    yield "Size", f"{size[0]}x{size[1]}"
    if checkpoint:
        yield from (("Model hash", checkpoint.hash), ("Model", _name(_stem(checkpoint.name))))
    for vae in (p for p in request.plugins if p.kind == "vae"):
        yield from (("VAE hash", vae.file.hash), ("VAE", _name(vae.file.name)))
    if checkpoint and request.model and checkpoint != request.model:
        yield from (("Pipeline hash", request.model.hash), ("Pipeline", _name(request.model.name)))
    if request.branch is not None:
        yield from (("Branch hash", request.branch.hash), ("Branch", _name(request.branch.name)))
    if request.clip_skip != 1:
        yield "Clip skip", request.clip_skip
    yield from _mode_settings(request)
    if request.branch_scale != 1:
        yield "Branch scale", _number(request.branch_scale)
    if (request.branch_start, request.branch_end) != (0, 1):
        yield "Branch window", f"{_number(request.branch_start)}-{_number(request.branch_end)}"
    yield "Branch schedule", _quoted(request.branch_schedule)
    yield "World", "" if request.world is None else _number(request.world)
    yield from _rules(request)
    if request.english_guidance is not None:
        yield "English CFG scale", _number(request.english_guidance)
    yield from (("English prompt", _quoted(request.prompt_en)),)
    yield from (("English negative prompt", _quoted(request.negative_en)),)
    for name, kind in (("Lora hashes", "adapter"), ("TI hashes", "embedding")):
        hashes = [f"{_name(p.name)}: {p.file.hash}" for p in request.plugins if p.kind == kind]
        yield name, '"' + ", ".join(hashes) + '"' if hashes else ""
    for i, control in enumerate(p for p in request.plugins if p.kind == "controlnet"):
        yield f"ControlNet {i}", _control(control)
    for shown in (p for p in request.plugins if p.kind == "ip_adapter"):
        model = f"Model: {_name(shown.name)} [{shown.file.hash}]"
        yield "IP-Adapter", f'"{model}, Weight: {_number(shown.strength)}"'
    yield from _approximation(request)
    for i, use in enumerate(request.beside):
        said = f"Branch: {_name(use.file.name)} [{use.file.hash}], Weight: {_number(use.scale)}"
        yield f"Beside {i}", json.dumps(said)
    if request.precision not in (None, "fp32"):
        yield "Precision", request.precision
    if request.enlarge != 1:
        yield "Enlarged", request.enlarge
    yield "Version", f"bdm {request.versions.bdm}" if request.versions.bdm else ""


def _rules(request: Request) -> Iterable[tuple[str, Any]]:
    """How prompts were read, where it is not A1111's way."""
    rules = request.rules
    if (rules.emphasis, rules.chunks) != (A1111.emphasis, A1111.chunks):
        yield from (("Emphasis", rules.emphasis), ("Chunks", rules.chunks))
    for name in ("punctuation", "routing", "simplified"):
        if getattr(rules, name) != getattr(A1111, name):
            yield name.capitalize(), getattr(rules, name)


def _approximation(request: Request) -> Iterable[tuple[str, Any]]:
    """What was left out."""
    left_out = request.approximation
    if (left_out.guidance_start, left_out.guidance_end) != (0, 1):
        yield "Guidance interval", f"{_number(left_out.guidance_start)}-{_number(left_out.guidance_end)}"
    for name in ("branch_every", "deep_every"):
        if getattr(left_out, name) != 1:
            yield name.replace("_", " ").capitalize(), getattr(left_out, name)


def _mode_settings(request: Request) -> Iterable[tuple[str, Any]]:
    names = {
        "strength": "Denoising strength",
        "scale": "Hires upscale",
        "upscaler": "Hires upscaler",
        "second_steps": "Hires steps",
        "blur": "Mask blur",
    }
    for name, value in request.mode.settings:
        if name == "tiling" or (name == "second_steps" and not value):
            continue
        shown = _number(value) if isinstance(value, float) else value
        yield names.get(name, name.replace("_", " ").capitalize()), _quoted(shown)


def _calls(plugins: Iterable[PluginUse], prompt: str) -> list[str]:
    """How A1111's prompts call adapters: ``<lora:name:strength in the text encoder:in the UNet>``."""
    calls = []
    for plugin in plugins:
        if plugin.kind == "adapter" and f"<lora:{plugin.name}:" not in prompt:
            unet, text = plugin.strength, plugin.text_strength
            both = _number(unet) if text in (None, unet) else f"{_number(text)}:{_number(unet)}"
            calls.append(f"<lora:{_name(plugin.name)}:{both}>")
    return calls


def _control(plugin: PluginUse) -> str:
    said = {
        "Module": plugin.annotator or "none",
        "Model": f"{_name(plugin.name)} [{plugin.file.hash}]",
        "Weight": _number(plugin.strength),
        "Guidance Start": _number(plugin.start),
        "Guidance End": _number(plugin.end),
    }
    return '"' + ", ".join(f"{name}: {value}" for name, value in said.items()) + '"'


def _number(value: Any) -> str:
    """A number without a zero that says nothing."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _stem(name: str) -> str:
    """A model's name as A1111 writes it, without a file's ending."""
    stem, dot, ending = name.rpartition(".")
    return stem if f"{dot}{ending}".lower() in (".safetensors", ".ckpt", ".pt", ".bin") else name


def _name(name: str) -> str:
    """A file's name, without what would end a setting."""
    return printable(name).translate({ord(character): "_" for character in '<>:,"'})


def _quoted(text: Any) -> Any:
    """A text as A1111 quotes it, which is JSON; colons are escaped, so that naive readers see no setting."""
    if not isinstance(text, str) or not text:
        return text
    if not any(character in text for character in ',:"\n'):
        return text
    return json.dumps(text, ensure_ascii=False).replace(":", "\\u003a")


def picture_info(
    request: Request, suffix: str, size: tuple[int, int], sampler: str = "", schedule: str = ""
) -> dict[str, Any]:
    """Arguments for PIL's ``save`` that store how a picture was made.

    PNG takes both texts in iTXt, which is UTF-8. JPEG and WebP take A1111's in EXIF's UserComment. JPEG holds
    64 kB of it: longer prompts are cut there, and the JSON, in segments of its own, is not.

    Args:
        request: what drew it, complete.
        suffix: of the file.
        size: the picture's own, in pixels.
        sampler: see ``parameters_text``.
        schedule: likewise.
    """
    content = json.dumps(request.to_json(), ensure_ascii=False)
    suffix = suffix.lower()
    if suffix == ".png":
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(request, size, sampler, schedule))
        info.add_itxt("bdm", content)
        return {"pnginfo": info}
    note = content.encode()
    if suffix == ".webp":
        text = parameters_text(request, size, sampler, schedule)
        return {"exif": _exif(text, JSON_SEGMENT + note)}
    text = _fitting(request, size, sampler, schedule)
    return {"extra": _segments(note)} | ({"exif": _exif(text)} if text else {})


def _segments(content: bytes) -> bytes:
    """Content of any length as application segments of a JPEG."""
    room = _SEGMENT - len(JSON_SEGMENT)
    pieces = [JSON_SEGMENT + content[start : start + room] for start in range(0, len(content), room)]
    return b"".join(struct.pack(">HH", 0xFFE9, len(piece) + 2) + piece for piece in pieces)


def _fitting(request: Request, size: tuple[int, int], sampler: str, schedule: str) -> str:
    """The parameters' text as long as a JPEG takes it, with prompts cut as far as they must be.

    "" where the settings alone are longer.
    """

    def text(prompt: str, negative: str, **english: str) -> str:
        changed = replace(request, prompt=prompt, negative=negative, **english)
        return parameters_text(changed, size, sampler, schedule)

    whole = text(request.prompt, request.negative)
    if _units(whole) <= _JPEG_UNITS:
        return whole
    cut = {name: _cut(getattr(request, name), 1000) for name in ("prompt_en", "negative_en")}
    room = _JPEG_UNITS - _units(text("", "…" if request.negative else "", **cut))
    if room < 0:
        return ""
    # Each may have half, and what the other leaves of its own.
    ours = max(room // 2, room - _units(request.negative))
    prompt = _cut(request.prompt, ours)
    return text(prompt, _cut(request.negative, room - _units(prompt)), **cut)


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def _cut(text: str, units: int) -> str:
    """The beginning of a text in so many units of UTF-16."""
    if _units(text) <= units:
        return text
    return text.encode("utf-16-be")[: 2 * max(0, units - 1)].decode("utf-16-be", "ignore") + "…" * (units > 0)


def _exif(comment: str, note: bytes = b"") -> bytes:
    """EXIF with a UserComment, and a maker's note where there is one.

    Both are of the type that the standard says (7, undefined); PIL writes bytes (1). Two directories, the
    first of which says where the second is; then what their entries point to.
    """
    contents = {USER_COMMENT: b"UNICODE\0" + comment.encode("utf-16-be")}
    if note:
        contents[MAKER_NOTE] = note
    first = struct.pack(">HHHIII", 1, EXIF_IFD, 4, 1, 26, 0)
    place = 26 + 2 + 12 * len(contents) + 4
    entries, data = b"", b""
    for tag, content in sorted(contents.items()):
        entries += struct.pack(">HHII", tag, 7, len(content), place + len(data))
        data += content + b"\0" * (len(content) % 2)
    second = struct.pack(">H", len(contents)) + entries + struct.pack(">I", 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + first + second + data
