"""Models as they are moved."""

from __future__ import annotations

from typing import Any


class ModelPatcher:
    """Holds a model and says where it lies."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        #: How it was loaded last: True for all of it.
        self.whole: bool | None = None
        self.model.device = offload_device

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        self.whole = full_load or lowvram_model_memory == 0
        self.model.device = device_to

    def partially_unload(self, device_to: Any, memory_to_free: int = 0) -> int:
        return memory_to_free
