"""A ControlNet's weights out of a file's tensors: under one layout's names, and whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .control_signs import ControlSigns
from .names import controlnet_to_diffusers
from .remains import refuse_unknown
from .weights import read_json

#: Prefix of a ControlNet's weights in the original layout.
_PREFIX = "control_model."
#: Of the checkpoint that the first published ControlNets hold beside their own weights.
_BESIDE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
#: Modules that a backbone has not.
_OWN = ("controlnet_",)
#: Scales of a whole network's normalisations are around 1, of a difference around 0.
_LEAST_SCALE = 0.1

#: Gives a UNet's weights under diffusers' names, once they are needed.
Backbone = Callable[[], Mapping[str, Tensor]]


def control_weights(
    tensors: Mapping[str, Tensor], signs: ControlSigns, backbone: Backbone | None, source: Path
) -> dict[str, Tensor]:
    """A ControlNet's weights under diffusers' names.

    Args:
        tensors: a file's or folder's, in either layout.
        signs: what is told beside the weights.
        backbone: whose weights are added to those of a file of differences.
        source: for messages.

    Raises:
        UserError: something whose meaning is not known; differences without a backbone, or to another one.
    """
    if signs.middle_only:
        raise UserError(
            f"{source} acts on the middle block alone ({signs.middle_only}); such ControlNets cannot be used"
        )
    weights = controlnet_to_diffusers(_own(tensors, source))
    if not signs.differences:
        _refuse_unmarked_differences(weights, source)
        return weights
    if backbone is None:
        raise UserError(
            f"{source} holds differences to a backbone ({signs.differences}), which are no ControlNet by"
            " themselves; attach it to a pipeline, whose backbone is added then"
        )
    return _added(weights, backbone(), source)


def config_beside(source: Path) -> dict[str, Any] | None:
    """The configuration of a folder of diffusers', for one of whose files the folder was not named."""
    beside = source.parent / "config.json"
    if not source.name.startswith("diffusion_pytorch_model") or not beside.is_file():
        return None
    config = read_json(beside)
    return config if config.get("_class_name") == "ControlNetModel" else None


def _own(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The ControlNet's own tensors, without prefix and without those that are only there to be found."""
    markers = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "difference"}
    for key, tensor in markers.items():
        if tensor.numel() == 1 and not tensor.item():
            raise UserError(
                f"{source}: its tensor {key} is 0; other programs add a backbone where it is there at all:"
                " remove it, or get the file again"
            )
    left = {key: tensor for key, tensor in tensors.items() if key not in markers}
    own = {key.removeprefix(_PREFIX): tensor for key, tensor in left.items() if key.startswith(_PREFIX)}
    if not own:
        return left
    refuse_unknown(left, (_PREFIX, *_BESIDE), source)
    return own


def _refuse_unmarked_differences(weights: Mapping[str, Tensor], source: Path) -> None:
    scales = [
        tensor.abs().float().mean().item()
        for key, tensor in weights.items()
        if key.endswith("norm1.weight") and tensor.ndim == 1 and tensor.numel() and not tensor.is_meta
    ]
    if scales and max(scales) < _LEAST_SCALE:
        raise UserError(
            f"{source}: its normalisations scale by {max(scales):.2g} at most, as in a file of differences"
            " to a backbone, and no tensor 'difference' says so; get the file again"
        )


def _added(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Differences and the weights of the backbone that they are differences to."""
    whole = {}
    for key, difference in weights.items():
        if key.startswith(_OWN):
            whole[key] = difference
            continue
        if key not in base or base[key].shape != difference.shape:
            raise UserError(
                f"{source} holds a difference to {key} of shape {tuple(difference.shape)}, which the"
                " pipeline's backbone has not; it is made for another one"
            )
        whole[key] = base[key].detach().to("cpu", torch.float32) + difference.float()
    return whole
