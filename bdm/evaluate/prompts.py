"""``bdm evaluate`` with ``kind: prompts``: any model on one's own texts, scored by other models."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import PromptsConfig
from ..data.decoding import opened, see
from ..data.source import crop_to, to_pixels
from ..drawing.grid import labelled_grid, save_picture
from ..drawing.prompt_file import BDM870, read_prompt_file
from ..errors import UserError
from ..files import append_line, check_writable
from ..models.picture_scores import PictureScores
from ..models.samplers import make_scheduler, other_sampler
from ..pipeline import BridgePipeline
from .setup import other_parts, write_result
from .trials import Trial, draw

logger = logging.getLogger("bdm")

#: Pictures that are shown.
SHOWN = 40
#: Endings of the real pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def evaluate_prompts(config: PromptsConfig) -> dict[str, Any]:
    """Draw every text, score the pictures, and write them with ``report.md``, ``result.json`` and a row each.

    Returns:
        The figures, as printed.

    Raises:
        UserError: no texts, no model, or a scorer or real pictures that cannot be read.
    """
    if config.sampler:
        make_scheduler(config.sampler)  # an unknown name is refused before anything heavy
    check_writable(config.out)
    texts, wrong = read_texts(config)
    scores = PictureScores(config.scorer, config.features)
    drawn = _draw(config, texts)
    real = _real_pictures(Path(config.real), (drawn.shape[-1], drawn.shape[-2])) if config.real else []
    cosines = scores.cosines(drawn, texts)
    figures: dict[str, Any] = {"prompts": len(texts), "left_out": len(wrong)}
    figures |= {name: round(value, 5) for name, value in scores(drawn, texts, real).items()}
    if len(texts) > 1 and config.scorer:
        figures["clip_score_se"] = round(cosines.std().item() / math.sqrt(len(texts)), 5)
    _write_pictures(config.out, texts, drawn, cosines)
    write_result(config.out, figures, _report(config, figures, wrong))
    return figures


def read_texts(config: PromptsConfig) -> tuple[list[str], list[str]]:
    """The texts, and what is wrong with the rows that are left out."""
    if not isinstance(config.prompts, str):
        return [*config.prompts], []
    rows = read_prompt_file(Path(config.prompts), BDM870(long=config.long))
    texts = [row.said["prompt"] for row in rows if row.said.get("prompt")]
    wrong = [f"{row.where}: {row.wrong or 'has no prompt'}" for row in rows if not row.said.get("prompt")]
    if not texts:
        raise UserError(f"none of {len(rows)} rows of {config.prompts} has a prompt, the first: {wrong[0]}")
    return texts[: config.count], wrong


def _draw(config: PromptsConfig, texts: Sequence[str]) -> Tensor:
    """(N, 3, H, W) uint8 pictures of the texts."""
    others: dict[str, Any] = other_parts(config.branch, config.native_text_encoder)
    if config.backbone is not None:
        others["backbone"] = config.backbone
    pipe: Any = BridgePipeline.from_pretrained(config.model, **others)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    if config.sampler:
        pipe.scheduler = other_sampler(config.sampler, pipe.scheduler)
    nothing = [""] * len(texts)
    native, english = (nothing, [*texts]) if config.english else ([*texts], nothing)
    trial = Trial("prompts", "Prompts", native, english, [], branch_scale=0 if config.english else 1)
    sizes = {name: size for name in ("width", "height") if (size := getattr(config, name)) is not None}
    pictures = draw(pipe, trial, config.steps, config.guidance, config.batch, config.seed, **sizes)
    return to_pixels(pictures.cpu())


def _real_pictures(folder: Path, size: tuple[int, int]) -> list[Tensor]:
    """The pictures of a folder, cropped to (width, height); those that cannot be read are left out."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES):
        try:
            with opened(path) as file:
                seen = crop_to(see(file), *size)
        except Exception:  # Pillow's decoders raise many kinds
            logger.warning("%s cannot be read; it is left out", path)
            continue
        found.append(torch.from_numpy(np.array(seen)).permute(2, 0, 1).contiguous())
    if len(found) < 2:
        raise UserError(
            f"real: {folder} holds {len(found)} pictures that can be read; FID needs two at least"
        )
    return found


def _write_pictures(out: Path, texts: Sequence[str], drawn: Tensor, cosines: Tensor) -> None:
    """Every picture, a line for each, and a grid of evenly spread ones."""
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    for i, (text, pixels, cosine) in enumerate(zip(texts, drawn, cosines.tolist(), strict=True)):
        name = f"pictures/{i:06d}.png"
        save_picture(Image.fromarray(pixels.permute(1, 2, 0).numpy()), out / name)
        score = {} if math.isnan(cosine) else {"clip_score": round(cosine, 5)}
        append_line(rows, {"file": name, "prompt": text, **score})
    chosen = list(range(0, len(texts), -(-len(texts) // SHOWN)))
    labels = [texts[i] for i in chosen]
    save_picture(labelled_grid(drawn[chosen], labels, columns=8, scale=1), out / "grid.png")


def _report(config: PromptsConfig, figures: dict[str, Any], wrong: Sequence[str]) -> str:
    return "\n".join(
        [
            "# Evaluation",
            "",
            f"Model `{config.model}`, {figures['prompts']} prompts, {config.steps} steps of"
            f" {config.sampler or 'the default sampler'}, guidance {config.guidance:g}, seed {config.seed}.",
            "",
            "| figure | value |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in figures.items()),
            "",
            "![grid](grid.png)",
            "",
            *(["Rows that were left out:", "", *(f"* {line}" for line in wrong), ""] if wrong else []),
        ]
    )
