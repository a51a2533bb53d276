"""What A1111's clients send that has an effect here; other keys are taken and named in the answer."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    """What a client sends, in texts that can be written down."""

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, said: Any) -> Any:
        try:
            json.dumps(said, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half a character; write it anew") from None
        except RecursionError:
            raise ValueError("values inside values without end; give what the route reads") from None
        return said


class Options(Body):
    """Settings that a client may change for those that come after it."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str | None = None
    sd_vae: str | None = None
    CLIP_stop_at_last_layers: int | None = None


class Drawing(Body):
    """What txt2img and img2img have in common. A key that is null is left out."""

    model_config = ConfigDict(extra="allow")

    prompt: str | None = Field(None, description="both languages, or English where native_prompt is given")
    negative_prompt: str | None = None
    native_prompt: str | None = Field(None, description="read by the branch; prompt is the English one then")
    native_negative_prompt: str | None = None
    seed: int | None = Field(None, description="-1 for one that is drawn; picture i uses seed + i")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    denoising_strength: float | None = None
    override_settings: Options | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = None
    branch_scale: float | None = None
    branch_start: float | None = None
    branch_end: float | None = None
    branch_schedule: str | None = None
    world: float | None = None
    english_cfg_scale: float | None = None


class TextToImage(Drawing):
    """The body of txt2img."""

    enable_hr: bool | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None


class ImageToImage(Drawing):
    """The body of img2img."""

    init_images: list[str] | None = Field(None, description="one picture in base64")
    mask: str | None = Field(None, description="white where the picture is drawn anew, in base64")
    mask_blur: float | None = None
    inpainting_mask_invert: int | None = None


class PictureBody(Body):
    """The body of png-info."""

    image: str = Field(description="in base64")


def without_effect(body: BaseModel, prefix: str = "") -> list[str]:
    """The keys of a body that are not read."""
    return [prefix + name[:100] for name in list(body.model_extra or {})[:200]]
