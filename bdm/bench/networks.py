"""The networks that are compared: random ones of SD1.5's size, or a folder's.

And diffusers' ControlNet in the branch's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..config import BenchModelConfig
from ..method.branch import BranchModel
from ..models.backbone import load_backbone, load_vae
from ..models.noise_schedule import SD15_SCHEDULE
from ..text.native import NativeTextEncoder

#: The VAE of SD1.5; its UNet differs from diffusers' defaults only in the text width.
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
    norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
UNET: dict[str, Any] = dict(cross_attention_dim=768)


@dataclass(kw_only=True)
class Networks:
    """What both sides compute with; text encoders only where they come from a folder."""

    unet: Any
    branch: BranchModel
    vae: Any
    scheduler: Any
    text_encoder: Any = None
    tokenizer: Any = None
    native_text_encoder: NativeTextEncoder | None = None


def build_networks(config: BenchModelConfig) -> Networks:
    """The configured networks, frozen.

    A branch that is random or missing gets zero convolutions that are not zero.
    """
    torch.manual_seed(config.seed)
    if config.model is None:
        sizes: dict[str, Any] = {**UNET, "sample_size": config.latents, **config.unet}
        unet = UNet2DConditionModel(**sizes)
        vae = AutoencoderKL(**VAE | config.vae)
        networks = Networks(
            unet=unet,
            branch=random_branch(unet, config.native_width),
            vae=vae,
            scheduler=DDIMScheduler(**SD15_SCHEDULE),
        )
    else:
        stock = load_backbone(config.model)
        native = NativeTextEncoder.from_pretrained(config.model / "native_text_encoder")
        networks = Networks(
            unet=stock.unet,
            branch=_folder_branch(config.model / "branch", stock.unet, native.text_dim),
            vae=stock.vae,
            scheduler=DDIMScheduler(**SD15_SCHEDULE),
            text_encoder=stock.text_encoder,
            tokenizer=stock.tokenizer,
            native_text_encoder=native,
        )
    for part in vars(networks).values():
        if isinstance(part, nn.Module):
            freeze(part, config)
    return networks


def build_vae(config: BenchModelConfig) -> Any:
    """The configured VAE alone, frozen."""
    torch.manual_seed(config.seed)
    return freeze(
        AutoencoderKL(**VAE | config.vae) if config.model is None else load_vae(config.model), config
    )


def freeze(part: nn.Module, config: BenchModelConfig) -> nn.Module:
    """Make a network ready to be run: on its device, in its precision, nothing to be trained."""
    return nn.Module.to(
        part.eval().requires_grad_(False), torch.device(config.device), getattr(torch, config.dtype)
    )


def _folder_branch(folder: Path, unet: Any, width: int) -> BranchModel:
    return (
        BranchModel.from_pretrained(folder)
        if (folder / "config.json").is_file()
        else random_branch(unet, width)
    )


def random_branch(unet: Any, width: int) -> BranchModel:
    """A copy of the encoder whose zero convolutions are small random ones, so that what it does is seen in
    the result.
    """
    branch = BranchModel.from_backbone(unet, width)
    for convolution in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.1 / convolution.in_channels**0.5)  # pyright: ignore
    return branch


class NoPicture(nn.Module):
    """Stands for the convolutions of a ControlNet's condition picture, which a branch has not.

    Adds nothing, costs nothing.
    """

    def forward(self, picture: Tensor) -> Tensor:
        return picture.new_zeros(())


def peer_controlnet(unet: Any, branch: BranchModel) -> ControlNetModel:
    """diffusers' ControlNet computing what the branch computes, with the very same parameters."""
    with torch.device("meta"):
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        if branch.config["cross_attention_dim"] != unet.config["cross_attention_dim"]:
            config = dict(controlnet.config) | {"cross_attention_dim": branch.config["cross_attention_dim"]}
            controlnet: Any = ControlNetModel.from_config(config)
    controlnet.controlnet_cond_embedding = NoPicture()
    for name, parameter in branch.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(controlnet.get_submodule(owner), leaf, parameter)
    return controlnet.eval()
