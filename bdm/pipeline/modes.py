"""What pictures are drawn from, beside noise: a picture, a part of one, a smaller one of its own.

Every function takes a bilingual pipeline and the arguments of its call; what is attached to the pipeline
(plug-ins with their control pictures, an IP-Adapter, branches beside) acts as in the pipeline itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from torch import Tensor

from ..errors import UserError, quoted
from ..plugins.control_images import control_tensor
from ..plugins.kind import finite
from .canvas import Canvas, Pictures, as_tensor, extend, fitted, one_for_each, rounded, soft_mask
from .enlarging import enlarge_latents, enlarge_pictures, is_latent
from .pipelines import BridgeImg2ImgPipeline, BridgeInpaintPipeline
from .siblings import count_samples, sibling, with_generators
from .tiling import tiled_vae


def image_to_image(
    pipe: Any,
    image: Pictures,
    *,
    strength: float = 0.75,
    width: int | None = None,
    height: int | None = None,
    tiling: bool | None = None,
    **call: Any,
) -> Any:
    """Draw a picture from another one.

    Args:
        pipe: a bilingual pipeline.
        image: to start from; one for all prompts, or one for each picture.
        strength: how much is drawn anew, above 0 to 1: noise as of that share of the steps is put on it, and
            so many of the steps are taken.
        width: of the result; the picture's own, rounded, by default. It is resized to it.
        height: likewise.
        tiling: see ``bdm.pipeline.tiling.tiled_vae``.
        call: of the pipeline: ``prompt``, ``seed``, ``control_images`` ...

    Returns:
        The pipeline's output.

    Raises:
        UserError: no picture, a strength that leaves no step, or whatever the pipeline refuses.
    """
    call, count = with_generators(call), count_samples(call)
    pictures = one_for_each(image, count, "image")
    width, height = _size(pipe, pictures[0], width, height)
    _check_strength(strength, call)
    start = [fitted(picture, width, height) for picture in pictures]
    with tiled_vae(pipe, width, height, tiling):
        return sibling(pipe, BridgeImg2ImgPipeline)(image=start, strength=strength, **call)


def inpaint(
    pipe: Any,
    image: Pictures,
    mask: Pictures,
    *,
    strength: float = 0.75,
    blur: float = 4.0,
    width: int | None = None,
    height: int | None = None,
    tiling: bool | None = None,
    **call: Any,
) -> Any:
    """Draw a part of a picture anew, with an ordinary backbone.

    In each step the latents outside of the mask are those of the picture, with the step's noise. What the
    mask leaves is the picture's own in the end, to the last bit.

    Args:
        pipe: a bilingual pipeline.
        image: to start from; one for all prompts, or one for each picture.
        mask: white where it is drawn anew, black where it is kept; likewise.
        strength: how much is drawn anew there; at 1 nothing of the picture is known inside the mask.
        blur: of the mask's edge in pixels, over which the two are mixed.
        width: of the result; the picture's own, rounded, by default.
        height: likewise.
        tiling: see ``bdm.pipeline.tiling.tiled_vae``.
        call: of the pipeline.

    Returns:
        The pipeline's output.

    Raises:
        UserError: no picture, a mask that leaves nothing to draw, or whatever the pipeline refuses.
    """
    call, count = with_generators(call), count_samples(call)
    pictures, masks = one_for_each(image, count, "image"), one_for_each(mask, count, "mask")
    width, height = _size(pipe, pictures[0], width, height)
    _check_strength(strength, call)
    start = [fitted(picture, width, height) for picture in pictures]
    soft = [soft_mask(each, (width, height), finite(blur, "blur")) for each in masks]
    if not all(each.getextrema()[1] for each in soft):
        raise UserError(
            "the mask is black, so nothing is drawn anew; paint it white where something should be"
        )
    with tiled_vae(pipe, width, height, tiling):
        return _repainted(pipe, start, soft, strength, call)


def outpaint(
    pipe: Any,
    image: Pictures,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    overlap: int = 16,
    strength: float = 1.0,
    tiling: bool | None = None,
    **call: Any,
) -> Any:
    """Draw what lies around a picture.

    Args:
        pipe: a bilingual pipeline.
        image: to keep; one for all prompts, or one for each picture, all of one size.
        left: pixels to draw beside it; likewise the others.
        top: likewise.
        right: likewise.
        bottom: likewise.
        overlap: pixels of the picture's edge over which what is drawn fades into it.
        strength: how much is drawn anew; below 1 the picture's edge, drawn out, is what it starts from.
        tiling: see ``bdm.pipeline.tiling.tiled_vae``.
        call: of the pipeline.

    Returns:
        The pipeline's output; the pictures have the size of the one and the room around it.

    Raises:
        UserError: no room on any side, or whatever the pipeline refuses.
    """
    room = {"left": left, "top": top, "right": right, "bottom": bottom, "overlap": overlap}
    for name, pixels in room.items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
            raise UserError(f"{name} is {quoted(pixels)}; give a whole number of pixels from 0 on")
    if not left + top + right + bottom:
        raise UserError("no room is given to draw in; give left, top, right or bottom in pixels")
    call, count = with_generators(call), count_samples(call)
    _check_strength(strength, call)
    pictures = one_for_each(image, count, "image")
    canvases = [extend(picture, **room, factor=_factor(pipe)) for picture in pictures]
    if len({canvas.picture.size for canvas in canvases}) > 1:
        raise UserError("the pictures have several sizes; give pictures of one size, or draw them apart")
    with tiled_vae(pipe, *canvases[0].picture.size, tiling):
        output = _repainted(
            pipe,
            [canvas.picture for canvas in canvases],
            [canvas.mask for canvas in canvases],
            strength,
            call,
        )
    return StableDiffusionPipelineOutput(_cut(output.images, canvases[0]), output.nsfw_content_detected)


def hires(
    pipe: Any,
    *,
    scale: float = 2.0,
    strength: float = 0.7,
    upscaler: Any = "latent",
    second_steps: int | None = None,
    tiling: bool | None = None,
    **call: Any,
) -> Any:
    """Draw a picture, enlarge it, and draw it again from what it has become.

    Args:
        pipe: a bilingual pipeline.
        scale: how much larger than ``width`` and ``height``, which are the first pass's.
        strength: how much the second pass draws anew.
        upscaler: "latent" (also "latent nearest", "latent bicubic") enlarges the latents, "lanczos" or
            "nearest" the picture, an ``Upscaler`` or its file enlarges it with a network.
        second_steps: of which ``strength`` is taken; those of the first pass by default.
        tiling: see ``bdm.pipeline.tiling.tiled_vae``.
        call: of the pipeline.

    Returns:
        The pipeline's output.

    Raises:
        UserError: a scale below 1, an unknown upscaler, or whatever the pipeline refuses.
    """
    scale = finite(scale, "scale")
    if scale < 1.0:
        raise UserError(f"scale {scale:g}: give 1 or more")
    call = with_generators(call)
    second = call if second_steps is None else call | {"num_inference_steps": second_steps}
    _check_strength(strength, second)
    latent = is_latent(upscaler)
    small = pipe(**call | {"output_type": "latent" if latent else "pt", "return_dict": True}).images
    factor = 1 if not latent else pipe.vae_scale_factor
    height, width = (_enlarged(side * factor, scale, _factor(pipe)) for side in small.shape[-2:])
    size = (height // factor, width // factor)
    enlarge = enlarge_latents if latent else enlarge_pictures
    start = enlarge(small, size, upscaler, device=pipe.unet.device)
    names = ("width", "height", "latents", "timesteps", "sigmas")
    second = {name: value for name, value in second.items() if name not in names}
    second |= {"control_images": _resized(call.get("control_images"), (height, width))}
    with tiled_vae(pipe, width, height, tiling):
        return sibling(pipe, BridgeImg2ImgPipeline)(image=start, strength=strength, **second)


def _repainted(
    pipe: Any, start: list[Image.Image], soft: list[Image.Image], strength: float, call: Mapping[str, Any]
) -> Any:
    """Pictures whose masked parts are drawn anew and mixed with the rest."""
    kind = call.get("output_type", "pil")
    inner = dict(call) | {"output_type": "latent" if kind == "latent" else "pt", "return_dict": True}
    width, height = start[0].size
    output = sibling(pipe, BridgeInpaintPipeline)(
        image=start, mask_image=soft, strength=strength, width=width, height=height, **inner
    )
    if kind != "latent":
        kept = torch.stack([as_tensor(picture) for picture in start]).to(output.images)
        mask = torch.stack([as_tensor(each) for each in soft]).to(output.images)
        mixed = torch.lerp(kept, output.images, mask)
        # Where the mask is 0 or 1 nothing is rounded.
        mixed = torch.where(mask == 0, kept, torch.where(mask == 1, output.images, mixed))
        output.images = _as(pipe, mixed, kind)
    return output


def _as(pipe: Any, pictures: Tensor, kind: str) -> Any:
    """Pictures (N, 3, H, W) in [0, 1] in the form that is asked for."""
    if kind == "pt":
        return pictures
    arrays = pipe.image_processor.pt_to_numpy(pictures)
    return arrays if kind == "np" else pipe.image_processor.numpy_to_pil(arrays)


def _cut(pictures: Any, canvas: Canvas) -> Any:
    """The part of a canvas that was wanted."""
    width, height = canvas.size
    if isinstance(pictures, list):
        return [picture.crop((0, 0, width, height)) for picture in pictures]
    if isinstance(pictures, Tensor):
        factor = canvas.picture.width // pictures.shape[-1]  # latents' pixels
        return pictures[..., : -(-height // factor), : -(-width // factor)]
    return pictures[:, :height, :width]


def _factor(pipe: Any) -> int:
    return max(8, pipe.vae_scale_factor)


def _size(pipe: Any, picture: Image.Image, width: int | None, height: int | None) -> tuple[int, int]:
    pipe._check_sides(height, width)
    own = rounded(picture, _factor(pipe))
    return width or own[0], height or own[1]


def _enlarged(side: int, scale: float, factor: int) -> int:
    return max(factor, round(side * scale / factor) * factor)


def _resized(control: Any, size: tuple[int, int]) -> Any:
    """Control pictures of another size."""
    if control is None:
        return None
    if isinstance(control, Mapping):
        return {name: _resized(pictures, size) for name, pictures in control.items()}
    tensor = control_tensor(control)
    return torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True).clamp(0, 1)


def _check_strength(strength: float, call: Mapping[str, Any]) -> None:
    strength, steps = finite(strength, "strength"), call.get("num_inference_steps", 50)
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength {strength:g}: give a number above 0, to 1")
    if isinstance(steps, int) and int(steps * strength) < 1:
        raise UserError(
            f"strength {strength:g} of {steps} steps leaves none to take; give {1 / steps:.2g} or more"
        )
