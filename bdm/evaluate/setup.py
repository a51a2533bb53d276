"""What both evaluations share: the checks and models they begin with, and how their results are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import EvaluateConfig
from ..emoji.judge import JudgeModel
from ..emoji.world import COLOUR_NAMES, World
from ..errors import UserError
from ..files import check_writable, write_json
from ..models.samplers import make_scheduler, other_sampler
from ..pipeline import BridgePipeline
from ..text.native import NativeTextEncoder


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on which concepts, and who judges.

    Attributes:
        world: the concepts.
        judges: by the prefix of their figures: "" is the first, "second_" one that shares nothing with it.
        pipe: what draws.
    """

    world: World
    judges: dict[str, JudgeModel]
    pipe: Any

    @property
    def judge(self) -> JudgeModel:
        """The first judge."""
        return self.judges[""]

    @property
    def size(self) -> int:
        """Side of the model's pictures in pixels."""
        return picture_side(self.pipe)


def open_evaluation(config: EvaluateConfig) -> Evaluation:
    """Load what an evaluation works with, the cheap checks first, and make its folder.

    Raises:
        UserError: an unknown sampler, a folder that cannot be written, a judge of another world, or no model.
    """
    torch.set_flush_denormal(True)
    if config.sampler:
        make_scheduler(config.sampler)  # an unknown name is refused before anything heavy
    check_writable(config.out)
    world = World(config.world.concepts, config.world.seed)
    judges = open_judges(config.judge, config.second_judge, world)
    pipe = BridgePipeline.from_pretrained(
        config.model, **other_parts(config.branch, config.native_text_encoder)
    )
    pipe.set_progress_bar_config(disable=True)
    refuse_other_size(pipe, config.model, judges, {"": config.judge, "second_": config.second_judge})
    if config.sampler:
        pipe.scheduler = other_sampler(config.sampler, pipe.scheduler)
    config.out.mkdir(parents=True, exist_ok=True)
    return Evaluation(world, judges, pipe)


def other_parts(branch: str | None, native_text_encoder: str | None) -> dict[str, Any]:
    """The parts that take the places of the model's own."""
    parts: dict[str, Any] = {}
    if branch is not None:
        parts["branch"] = branch
    if native_text_encoder is not None:
        parts["native_text_encoder"] = NativeTextEncoder.from_pretrained(native_text_encoder)
    return parts


def open_judges(judge: str, second: str | None, world: World) -> dict[str, JudgeModel]:
    """The judges by the prefix of their figures (see ``Evaluation``).

    Raises:
        UserError: one of another world.
    """
    judges = {"": _open_judge(judge, world)}
    return judges if second is None else judges | {"second_": _open_judge(second, world)}


def _open_judge(folder: str, world: World) -> JudgeModel:
    judge = JudgeModel.from_pretrained(folder)
    known = judge.config["concepts"], judge.config["colours"]
    wanted = len(world.concepts), len(COLOUR_NAMES)
    if known != wanted:
        raise UserError(
            f"the judge in {folder} knows {known[0]} concepts in {known[1]} colours and the world has"
            f" {wanted[0]} in {wanted[1]}; train a judge for this world with configs/emoji/judge.yaml"
        )
    return judge


def picture_side(parts: Any) -> int:
    """Side of the square pictures that a model was made for, in pixels."""
    return parts.unet.config["sample_size"] * 2 ** (len(parts.vae.config["block_out_channels"]) - 1)


def refuse_other_size(
    parts: Any, model: str, judges: Mapping[str, JudgeModel], folders: Mapping[str, str | None]
) -> None:
    """Refuse judges that were trained on pictures of another size than a model's: those of another world.

    Args:
        parts: the model.
        model: its folder, for messages.
        judges: by the prefix of their figures.
        folders: theirs.

    Raises:
        UserError: names both sizes.
    """
    side = picture_side(parts)
    for prefix, judge in judges.items():
        if judge.config["size"] != side:
            raise UserError(
                f"{model} draws pictures of {side}x{side} pixels and the judge in {folders[prefix]} knows"
                f" those of {judge.config['size']}x{judge.config['size']}: they are of two worlds; give a"
                " model and judges of one (configs/emoji or configs/emoji_64)"
            )


def below_reach(figures: Mapping[str, Any], reach: Mapping[str, float]) -> str:
    """A sentence that names the figures below what they should reach."""
    short = [
        f"{key} {figures[key]:.3f} (reach {least:.2f})"
        for key, least in reach.items()
        if key in figures and figures[key] < least
    ]
    return f"Below reach: {', '.join(short) or 'nothing'}."


def write_result(out: Path, result: dict[str, Any], report: str) -> None:
    """Write ``result.json`` and ``report.md`` and print the result in one line."""
    write_json(out / "result.json", result)
    (out / "report.md").write_text(report, encoding="utf-8")
    print(json.dumps(result))
