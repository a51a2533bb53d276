"""How a picture was made, written into the picture: A1111's ``parameters`` text and a ``bdm`` JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..errors import printable

_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769
#: Units of UTF-16 that a JPEG's segment holds: 65,533 bytes less the header of EXIF and two directories.
_JPEG_UNITS = (65_533 - 6 - 44 - 8) // 2


def describe(
    *,
    prompt: str,
    negative: str,
    prompt_en: str,
    negative_en: str,
    seed: int,
    steps: int,
    guidance: float,
    sampler: str,
    branch_scale: float,
    size: tuple[int, int],
    model: str,
    english_guidance: float | None = None,
    clip_skip: int = 1,
    plugins: Sequence[Any] = (),
) -> dict[str, Any]:
    """The facts needed to make a picture again; ``plugins`` are what ``pipe.plugins`` lists."""
    return {
        "prompt": prompt,
        "negative_prompt": negative,
        "prompt_en": prompt_en,
        "negative_prompt_en": negative_en,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance,
        "english_guidance": english_guidance,
        "sampler": sampler,
        "branch_scale": branch_scale,
        "width": size[0],
        "height": size[1],
        "model": model,
        "clip_skip": clip_skip,
        "plugins": [
            {"name": p.name, "kind": p.kind, "file": p.source.name, "strength": p.strength, "hash": p.hash}
            for p in plugins
        ],
    }


def parameters_text(facts: dict[str, Any]) -> str:
    """A1111's grammar: prompt, negative prompt, one line of settings."""
    lines = [facts["prompt"]]
    if facts["negative_prompt"]:
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    checkpoint = [plugin["hash"] for plugin in facts["plugins"] if plugin["kind"] == "checkpoint"]
    adapters = [
        f"{printable(plugin['name'])}: {plugin['hash']}"
        for plugin in facts["plugins"]
        if plugin["kind"] == "adapter"
    ]
    extras = [f"Model hash: {checkpoint[-1]}"] if checkpoint else []
    extras += [f"Clip skip: {facts['clip_skip']}"] if facts["clip_skip"] != 1 else []
    extras += ['Lora hashes: "' + ", ".join(adapters) + '"'] if adapters else []
    lines.append(
        f"Steps: {facts['steps']}, Sampler: {facts['sampler']}, CFG scale: {facts['guidance_scale']}, Seed:"
        f" {facts['seed']}, Size: {facts['width']}x{facts['height']}, Model: {printable(facts['model'])}"
        + "".join(f", {extra}" for extra in extras)
    )
    return "\n".join(lines)


def picture_info(facts: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Arguments for PIL's ``save`` that store the facts; Chinese goes into PNG's iTXt, which is UTF-8.

    JPEG holds 64 kB of it: longer prompts are cut there, which the picture is not. Texts that no encoding
    takes (halves of characters, in names of files) have a replacement character there.
    """
    facts = _encodable(facts)
    if suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(facts))
        info.add_itxt("bdm", json.dumps(facts, ensure_ascii=False))
        return {"pnginfo": info}
    jpeg = suffix.lower() in (".jpg", ".jpeg")
    text = _fitting(facts, _JPEG_UNITS) if jpeg else parameters_text(facts)
    return {"exif": _exif(text)} if text else {}


def _encodable(value: Any) -> Any:
    """The same facts, with a replacement character for each lone surrogate."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _fitting(facts: dict[str, Any], units: int) -> str:
    """The parameters' text in so many units of UTF-16, with prompts cut as far as they must be.

    "" where the settings alone are longer.
    """
    prompt, negative = facts["prompt"], facts["negative_prompt"]
    if _units(parameters_text(facts)) <= units:
        return parameters_text(facts)
    short = facts | {"prompt": "", "negative_prompt": "…" if negative else ""}
    room = units - _units(parameters_text(short))
    if room < 0:
        return ""
    # Each may have half, and what the other leaves of its own.
    ours = max(room // 2, room - _units(negative))
    cut = _cut(prompt, ours)
    return parameters_text(facts | {"prompt": cut, "negative_prompt": _cut(negative, room - _units(cut))})


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def _cut(text: str, units: int) -> str:
    """The beginning of a text in so many units of UTF-16."""
    if _units(text) <= units:
        return text
    return text.encode("utf-16-be")[: 2 * max(0, units - 1)].decode("utf-16-be", "ignore") + "…" * (units > 0)


def _exif(comment: str) -> bytes:
    """EXIF with a UserComment alone, of the type that the standard says (7, undefined); PIL writes bytes (1).

    Two directories of one entry each, the first of which says where the second is.
    """
    content = b"UNICODE\0" + comment.encode("utf-16-be")
    first = struct.pack(">HHHIII", 1, _EXIF_IFD, 4, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, _USER_COMMENT, 7, len(content), 44, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + first + second + content
