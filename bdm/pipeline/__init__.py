"""Bilingual pipelines: stock diffusers pipelines with the bridge on their UNet and four independent texts."""

from .pipelines import (
    BridgeControlNetPipeline,
    BridgeImg2ImgPipeline,
    BridgeInpaintPipeline,
    BridgeMixin,
    BridgePipeline,
)

__all__ = [
    "BridgeControlNetPipeline",
    "BridgeImg2ImgPipeline",
    "BridgeInpaintPipeline",
    "BridgeMixin",
    "BridgePipeline",
]
