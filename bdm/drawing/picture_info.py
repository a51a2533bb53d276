"""How a picture was made, written into the picture: A1111's ``parameters`` text and a ``bdm`` JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769


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
        f"{plugin['name']}: {plugin['hash']}" for plugin in facts["plugins"] if plugin["kind"] == "adapter"
    ]
    extras = [f"Model hash: {checkpoint[-1]}"] if checkpoint else []
    extras += [f"Clip skip: {facts['clip_skip']}"] if facts["clip_skip"] != 1 else []
    extras += ['Lora hashes: "' + ", ".join(adapters) + '"'] if adapters else []
    lines.append(
        f"Steps: {facts['steps']}, Sampler: {facts['sampler']}, CFG scale: {facts['guidance_scale']}, Seed:"
        f" {facts['seed']}, Size: {facts['width']}x{facts['height']}, Model: {facts['model']}"
        + "".join(f", {extra}" for extra in extras)
    )
    return "\n".join(lines)


def picture_info(facts: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Arguments for PIL's ``save`` that store the facts; Chinese goes into PNG's iTXt, which is UTF-8."""
    text, content = parameters_text(facts), json.dumps(facts, ensure_ascii=False)
    if suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt("parameters", text)
        info.add_itxt("bdm", content)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return {"exif": exif}
