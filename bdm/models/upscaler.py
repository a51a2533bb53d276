"""Networks that enlarge pictures: ESRGAN and what else spandrel knows, from files people have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line
from ..extras import import_extra
from ..formats.header import is_safetensors
from ..formats.pickles import unpickle
from ..formats.weights import read_tensors


class Upscaler:
    """Enlarges pictures by a whole factor.

    Args:
        file: weights (``.pth``, ``.safetensors`` ...), read without executing anything in them.
        device: where it computes.

    Attributes:
        scale: the factor.

    Raises:
        UserError: spandrel is not installed; a damaged file, or one of no kind that it knows.
    """

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        spandrel = import_extra("an upscaler's file")
        weights = _weights(Path(file))
        try:
            model = spandrel.ModelLoader(device).load_from_state_dict(
                spandrel.canonicalize_state_dict(weights)
            )
        except Exception as error:  # each architecture has checks and mistakes of its own
            raise UserError(
                f"{file} is no upscaler that spandrel knows ({first_line(error)}); give one, such as an"
                " ESRGAN's"
            ) from None
        enlarges = isinstance(model, spandrel.ImageModelDescriptor) and model.purpose != "FaceSR"
        if not enlarges or (model.input_channels, model.output_channels) != (3, 3):
            raise UserError(
                f"{file} ({model.architecture.name}) does not enlarge RGB pictures; give one that does"
            )
        self._model = model.eval()
        self.scale: int = model.scale

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Enlarge (N, 3, H, W) pictures in [0, 1] to (N, 3, H scale, W scale), one by one."""
        device, dtype = self._model.device, self._model.dtype
        enlarged = [self._model(picture[None].to(device, dtype)) for picture in pictures]
        return torch.cat(enlarged).clamp(0, 1).to(pictures)


def _weights(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; check the path")
    if is_safetensors(file):
        return read_tensors(file)
    content = unpickle(file, header_only=False)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no weights by their names; give an upscaler's file")
    return content
