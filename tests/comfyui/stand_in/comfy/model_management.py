"""Where models lie; here, all on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: What was asked for, in order.
loaded: list[Any] = []


def _cpu() -> torch.device:
    return torch.device("cpu")


get_torch_device = unet_offload_device = intermediate_device = _cpu
text_encoder_device = text_encoder_offload_device = _cpu


def unet_dtype(device: Any = None, model_params: int = 0) -> torch.dtype:
    return torch.float32


def text_encoder_dtype(device: Any = None) -> torch.dtype:
    return torch.float32


def load_models_gpu(models: Sequence[Any]) -> None:
    for model in models:
        model.load(model.load_device)
        loaded.append(model)


def cast_to_device(tensor: torch.Tensor, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device, dtype)
