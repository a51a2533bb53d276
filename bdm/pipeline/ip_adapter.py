"""IP-Adapters: a picture as a prompt of the backbone's (arXiv 2308.06721). The branch sees nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError, first_line, printable
from ..formats.weights import read_tensors
from ..plugins.kind import finite

#: What a file's names begin with, in both of the forms that they come in.
_PARTS = ("image_proj", "ip_adapter")


@contextmanager
def ip_adapter(pipe: Any, file: str | Path, scale: float = 1.0, image_encoder: Any = None) -> Iterator[None]:
    """Let an IP-Adapter act on the backbone inside the ``with`` block.

    A call then takes ``ip_adapter_image=`` (with an image encoder) or ``ip_adapter_image_embeds=``; so do the
    modes (see ``bdm.pipeline.modes``). Behind the block every output is bit for bit what it was.

    Args:
        pipe: a bilingual pipeline.
        file: the adapter's weights, read without executing anything in them.
        scale: strength of the picture beside the English prompt; 0 is without effect.
        image_encoder: a ``CLIPVisionModelWithProjection`` of the adapter's kind; the pipeline's own by
            default.

    Raises:
        UserError: a file that is no IP-Adapter of SD1.5, or of another width; one is attached already.
    """
    scale, path = finite(scale, "scale"), Path(file)
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        raise UserError("this backbone has an IP-Adapter already; leave its block first")
    weights = _read(path)
    own_encoder, own_extractor = pipe.image_encoder, pipe.feature_extractor
    processors = dict(pipe.unet.attn_processors)
    kind = pipe.unet.config.get("encoder_hid_dim_type")
    try:
        _attach(pipe, weights, path, image_encoder)
        pipe.set_ip_adapter_scale(scale)
        yield
    finally:
        pipe.unet.encoder_hid_proj = None
        pipe.unet.register_to_config(encoder_hid_dim_type=kind)
        pipe.unet.set_attn_processor(processors)
        pipe.register_modules(image_encoder=own_encoder, feature_extractor=own_extractor)


def _attach(pipe: Any, weights: Mapping[str, Any], path: Path, image_encoder: Any) -> None:
    if image_encoder is not None:
        pipe.register_modules(image_encoder=image_encoder)
    try:
        pipe.load_ip_adapter(dict(weights), subfolder=None, weight_name=None, image_encoder_folder=None)
    except Exception as error:  # diffusers finds out what does not fit by building it
        raise UserError(
            f"{path} does not fit this backbone ({first_line(error)}); give an IP-Adapter for SD1.5"
        ) from None


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The two parts of a file: what projects a picture's features, and the layers that attend to them."""
    weights: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in read_tensors(path).items():
        part, _, rest = name.partition(".")
        if part not in weights or not rest:
            raise UserError(
                f"{path} is no IP-Adapter: it holds {printable(name, 80)!r}; give a file of image_proj and"
                " ip_adapter"
            )
        weights[part][rest] = tensor
    if missing := [part for part in _PARTS if not weights[part]]:
        raise UserError(f"{path} is no IP-Adapter: it holds no {missing[0]}; give another file")
    return weights
